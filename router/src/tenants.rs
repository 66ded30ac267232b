//! Tenants: identification of the client of a request, and limits per tenant.
//!
//! If API keys are configured, the key identifies the tenant. Otherwise the header `x-overfill-tenant` does; a proxy in
//! front of the router may set it. A request without the header belongs to the unnamed tenant.

use std::{
    fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock as _, MonotonicClock},
    state::{InMemoryState, NotKeyed},
};
use overfill_cluster::reloaded::Reloaded;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::GenerateError;

/// Header with the tenant's name, used if no API keys are configured.
pub const TENANT_HEADER: &str = "x-overfill-tenant";
/// Maximum length of a tenant's name, in bytes.
const MAX_NAME_BYTES: usize = 128;
/// Minimum length of a key, in bytes. Shorter keys could be guessed.
const MIN_KEY_BYTES: usize = 16;

/// An entry of the file of API keys.
#[derive(Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    key: String,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    max_requests: Option<usize>,
    #[serde(default)]
    requests_per_minute: Option<NonZeroU32>,
    #[serde(default)]
    admin: bool,
}

fn one() -> u32 {
    1
}

type Rate = RateLimiter<NotKeyed, InMemoryState, MonotonicClock>;

/// A client or a group of clients that shares limits and a scheduling weight.
pub struct Tenant {
    /// Name from the file of API keys or from the header.
    pub name: Arc<str>,
    /// The tenant's share of the nodes under load, relative to other tenants' weights.
    pub weight: u32,
    /// Whether the tenant may drain nodes on the router's page.
    pub admin: bool,
    max_requests: Option<usize>,
    requests: AtomicUsize,
    rate: Option<Rate>,
}

/// Sequences that count against the tenant's limit until this is dropped.
pub struct Counted {
    pub(crate) tenant: Arc<Tenant>,
    sequences: usize,
}

impl Tenant {
    /// Creates a tenant without limits.
    pub fn named(name: &str) -> Self {
        let name = name.into();
        Self { name, weight: 1, admin: false, max_requests: None, requests: AtomicUsize::new(0), rate: None }
    }

    fn new(entry: &Entry) -> Self {
        Self {
            name: entry.name.as_str().into(),
            weight: entry.weight,
            admin: entry.admin,
            max_requests: entry.max_requests,
            requests: AtomicUsize::new(0),
            rate: entry
                .requests_per_minute
                .map(|n| RateLimiter::direct_with_clock(Quota::per_minute(n), MonotonicClock)),
        }
    }

    /// Counts a request of `sequences` sequences. Returns an error if it would exceed a limit of the tenant.
    pub fn count(self: &Arc<Self>, sequences: usize) -> Result<Counted, GenerateError> {
        let before = self.requests.fetch_add(sequences, Ordering::AcqRel);
        let counted = Counted { tenant: self.clone(), sequences };
        if let Some(limit) = self.max_requests.filter(|&limit| before + sequences > limit) {
            let what = format!("{limit} sequences at once ({before} are running or waiting)");
            return Err(GenerateError::Limited { what, retry_after: Duration::from_secs(1) });
        }
        if let Some(rate) = &self.rate
            && let Err(refused) = rate.check()
        {
            let retry_after = refused.wait_time_from(MonotonicClock.now());
            let what = format!("{} requests per minute", rate_per_minute(refused.quota()));
            return Err(GenerateError::Limited { what, retry_after });
        }
        Ok(counted)
    }
}

fn rate_per_minute(quota: Quota) -> u32 {
    quota.burst_size().get()
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.tenant.requests.fetch_sub(self.sequences, Ordering::AcqRel);
    }
}

/// The file of API keys can't be read or is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct KeysError {
    path: PathBuf,
    message: String,
}

/// API keys of clients. The file is read again when it changes.
#[derive(Clone)]
pub struct ApiKeys {
    path: PathBuf,
    keys: Arc<Reloaded<Vec<Known>>>,
}

struct Known {
    entry: Entry,
    digest: [u8; 32],
    tenant: Arc<Tenant>,
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.path.display())
    }
}

impl ApiKeys {
    /// Reads a JSON list of `{"name", "key", "weight", "max_requests", "requests_per_minute", "admin"}`. Only the first
    /// two fields are required.
    pub fn load(path: PathBuf) -> Result<Self, KeysError> {
        let keys = read(&path, &[])?;
        Ok(Self { keys: Arc::new(Reloaded::new("API keys", vec![path.clone()], keys)), path })
    }

    /// The names of all tenants.
    pub fn names(&self) -> Vec<Arc<str>> {
        self.keys.get(|before| read(&self.path, before)).iter().map(|known| known.tenant.name.clone()).collect()
    }

    /// The tenant with this key. All keys are compared in constant time, so timing reveals nothing about them.
    pub fn tenant(&self, key: &str) -> Option<Arc<Tenant>> {
        let keys = self.keys.get(|before| read(&self.path, before));
        let digest = digest(key);
        let mut found = None;
        for known in keys.iter() {
            if bool::from(known.digest.ct_eq(&digest)) {
                found = Some(known.tenant.clone());
            }
        }
        found
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Reads the file. An entry that is unchanged from `before` keeps its counters.
fn read(path: &Path, before: &[Known]) -> Result<Vec<Known>, KeysError> {
    let fault = |message: String| KeysError { path: path.to_owned(), message };
    let bytes = fs::read(path).map_err(|e| fault(e.to_string()))?;
    let entries: Vec<Entry> = serde_json::from_slice(&bytes).map_err(|e| fault(e.to_string()))?;
    let mut keys: Vec<Known> = Vec::with_capacity(entries.len());
    for entry in entries {
        let Entry { name, key, weight, .. } = &entry;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(fault(format!("name must have 1 to {MAX_NAME_BYTES} bytes, got {}", name.len())));
        }
        if key.len() < MIN_KEY_BYTES {
            return Err(fault(format!("key of {name:?} must have at least {MIN_KEY_BYTES} bytes, got {}", key.len())));
        }
        if !(1..=1000).contains(weight) {
            return Err(fault(format!("weight of {name:?} must be in [1, 1000], got {weight}")));
        }
        if keys.iter().any(|known| known.entry.key == *key || known.entry.name == *name) {
            return Err(fault(format!("the key or name of {name:?} occurs twice")));
        }
        let kept = before.iter().find(|known| known.entry == entry).map(|known| known.tenant.clone());
        let tenant = kept.unwrap_or_else(|| Arc::new(Tenant::new(&entry)));
        keys.push(Known { digest: digest(key), tenant, entry });
    }
    Ok(keys)
}

/// The tenant of a request, from its `authorization` header (with API keys) or its tenant header (without).
pub fn identify(
    keys: Option<&ApiKeys>,
    authorization: Option<&str>,
    tenant: Option<&str>,
) -> Result<Arc<Tenant>, GenerateError> {
    let Some(keys) = keys else {
        let name = tenant.unwrap_or_default();
        if name.len() > MAX_NAME_BYTES {
            return Err(GenerateError::limit(TENANT_HEADER, format!("at most {MAX_NAME_BYTES} bytes"), name.len()));
        }
        return Ok(Arc::new(Tenant::named(name)));
    };
    let key = authorization.and_then(|value| value.split_once(' '));
    let key = key.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim());
    key.and_then(|key| keys.tenant(key)).ok_or(GenerateError::Unauthenticated)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"[{"name": "a", "key": "key-of-a-0123456789", "max_requests": 2},
        {"name": "b", "key": "key-of-b-0123456789", "weight": 3, "requests_per_minute": 2}]"#;

    fn keys(text: &str) -> Result<(tempfile::TempDir, ApiKeys), KeysError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        fs::write(&path, text).unwrap();
        Ok((folder, ApiKeys::load(path)?))
    }

    #[test]
    fn a_key_names_its_tenant_and_their_limits() {
        let (_folder, keys) = keys(FILE).unwrap();
        let who = |header: &str| identify(Some(&keys), Some(header), Some("b"));
        let a = who("Bearer key-of-a-0123456789").unwrap();
        assert_eq!((&*a.name, a.weight), ("a", 1));
        for header in ["Bearer key-of-a-012345678", "Basic key-of-a-0123456789", "key-of-a-0123456789", ""] {
            assert_eq!(who(header).err(), Some(GenerateError::Unauthenticated), "{header}");
        }
        let counted = a.count(2).unwrap();
        assert!(a.count(1).err().unwrap().to_string().contains("2 sequences at once"));
        drop(counted);
        drop(a.count(2).unwrap());
        let b = who("bearer key-of-b-0123456789").unwrap();
        (0..2).for_each(|_| drop(b.count(5).unwrap()));
        let Err(GenerateError::Limited { what, retry_after }) = b.count(1) else { panic!("no limit") };
        assert_eq!(what, "2 requests per minute");
        assert!(retry_after > Duration::ZERO && retry_after <= Duration::from_secs(30));
    }

    #[test]
    fn faults_of_the_file_are_named() {
        let fault = |text: &str| keys(text).err().unwrap().to_string();
        assert!(fault("{}").contains("keys.json: invalid type"));
        assert!(fault(r#"[{"name": "a", "key": "short"}]"#).ends_with("must have at least 16 bytes, got 5"));
        assert!(fault(&FILE.replace("key-of-b", "key-of-a")).ends_with("\"b\" occurs twice"));
        assert!(fault(&FILE.replace("\"weight\": 3", "\"weight\": 0")).ends_with("in [1, 1000], got 0"));
    }

    #[test]
    fn without_keys_a_header_tells_tenants_apart() {
        assert_eq!(&*identify(None, None, Some("x")).unwrap().name, "x");
        assert_eq!(&*identify(None, Some("Bearer anything"), None).unwrap().name, "");
        assert!(identify(None, None, Some(&"x".repeat(200))).is_err());
    }
}
