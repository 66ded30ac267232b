//! The models of the cluster, and the check that they can share KV.

use std::convert::Infallible;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use overfill_kv::KvSchema;
use overfill_proto::v1::{DescribeRequest, NodeInfo, node_client::NodeClient};

use super::child::Started;
use super::demo;
use crate::router_client::{channel, refusal};

/// A model and its served name.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// `None` means the name of the folder or file.
    pub name: Option<String>,
    /// A folder, a .gguf file or a hub id.
    pub model: String,
}

impl FromStr for Named {
    type Err = Infallible;
    /// `DIR`, `FILE.gguf`, `ORG/NAME`, or one of them after `NAME=`.
    fn from_str(s: &str) -> Result<Self, Infallible> {
        Ok(match s.split_once('=') {
            Some((name, model)) if !name.is_empty() && !name.contains('/') => {
                Self { name: Some(name.into()), model: model.into() }
            }
            _ => Self { name: None, model: s.into() },
        })
    }
}

impl Named {
    /// The name under which the model is served. The default is the name of its folder or file.
    pub fn served_name(&self) -> String {
        let last = self.model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        self.name.clone().unwrap_or_else(|| last.strip_suffix(".gguf").unwrap_or(last).to_owned())
    }
}

/// A full model and its decode models.
pub struct Pair {
    /// The model of the prefill nodes.
    pub full: Named,
    /// The models of the decode nodes, at least one.
    pub decode: Vec<Named>,
}

/// The models to run. Without --full, they are the demo pair. Without --decode, the full model also decodes.
pub fn resolve(full: Option<&Named>, decode: &[Named]) -> Result<Pair> {
    let Some(full) = full else {
        let (full, decode) = demo::unpack()?;
        let named = |name: &str, path: std::path::PathBuf| -> Result<Named> {
            let model = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned();
            Ok(Named { name: Some(name.into()), model })
        };
        return Ok(Pair { full: named("demo-full", full)?, decode: vec![named("demo", decode)?] });
    };
    let decode = if decode.is_empty() { vec![full.clone()] } else { decode.to_vec() };
    Ok(Pair { full: full.clone(), decode })
}

/// Checks before the router starts that every decode node can use the KV of the prefill nodes.
pub async fn check_pairing(nodes: &[Started]) -> Result<()> {
    let mut producer: Option<(&Started, KvSchema)> = None;
    for node in nodes.iter().filter(|n| n.ready.role == "prefill") {
        producer.get_or_insert((node, schema(node).await?));
    }
    let Some((producer, produced)) = producer else { bail!("there is no prefill node") };
    for node in nodes.iter().filter(|n| n.ready.role == "decode") {
        let consumed = schema(node).await?;
        if let Err(mismatch) = produced.check_consumer(&consumed) {
            bail!("{} can't decode over the KV of {}: {mismatch}", node.model, producer.model);
        }
    }
    Ok(())
}

async fn schema(node: &Started) -> Result<KvSchema> {
    let channel = channel(&node.grpc_url()).await?;
    let response = NodeClient::new(channel).describe(DescribeRequest {}).await;
    let info: NodeInfo = response.map_err(refusal)?.into_inner().info.unwrap_or_default();
    let schema = info.kv_schema.with_context(|| format!("{} did not describe its kv_schema", node.name))?;
    KvSchema::try_from(schema).with_context(|| format!("{}'s kv_schema", node.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_stand_before_a_model() {
        let parse = |s: &str| s.parse::<Named>().unwrap();
        assert_eq!(parse("small=/m/dir"), Named { name: Some("small".into()), model: "/m/dir".into() });
        assert_eq!(parse("/m/a=b"), Named { name: None, model: "/m/a=b".into() });
        assert_eq!(parse("org/name"), Named { name: None, model: "org/name".into() });
        let names = ["small=/m/dir", "/m/dir/", "m/a.gguf", "org/name"].map(|s| parse(s).served_name());
        assert_eq!(names, ["small", "dir", "a", "name"]);
    }

    #[test]
    fn a_full_model_alone_decodes_itself() {
        let full: Named = "/m".parse().unwrap();
        assert_eq!(resolve(Some(&full), &[]).unwrap().decode, [full]);
    }
}
