//! Targets for files of a model folder: `model/src/weights.rs`, `gguf/`, `config.rs`, `provenance.rs` and `text/`.

use std::fs;
use std::path::Path;

use overfill_model::{ModelConfig, ModelError, Provenance, Weights, text_files};
use overfill_text::{ChatMessage, TextFiles, TextModel};
use serde_json::Value;
use tempfile::TempDir;

use crate::input::Input;
use crate::text::TOKENIZER;

/// Configuration of a model with a few hundred weights.
pub(crate) const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 8,
    "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}"#;

/// Values of `quantization_config` for [`safetensors`].
pub(crate) const QUANTISATIONS: [&str; 6] = [
    "null",
    r#"{"quant_method": "fp8", "weight_block_size": [3, 2]}"#,
    r#"{"quant_method": "fp8"}"#,
    r#"{"quant_method": "gptq", "bits": 8, "group_size": 2}"#,
    r#"{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights":
        {"num_bits": 8, "type": "int", "symmetric": false, "strategy": "group", "group_size": 2}}}}"#,
    r#"{"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights":
        {"num_bits": 8, "type": "int", "symmetric": false, "strategy": "channel"}}}}"#,
];

/// Files that [`model_folder`] may write the input to. The first byte selects one.
pub(crate) const FILES: [&str; 8] = [
    "config.json",
    "overfill.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
];

thread_local! {
    /// One folder for all inputs, since creating a folder takes longer than reading one.
    static FOLDER: TempDir = tempfile::tempdir().expect("a folder for temporary files");
}

/// Calls `using` with a folder that contains exactly these files. `using` must drop all memory maps before it returns.
fn with_folder(files: &[(&str, &[u8])], using: impl FnOnce(&Path)) {
    FOLDER.with(|folder| {
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).expect("writing a temporary file");
        }
        using(folder.path());
        for (name, _) in files {
            fs::remove_file(folder.path().join(name)).expect("removing a temporary file");
        }
    });
}

/// Checks that an error message is not empty and has few lines.
fn check_error(error: &ModelError) {
    let text = error.to_string();
    assert!(!text.is_empty(), "the error has no message");
}

/// Reads every tensor in the file, and reads by rows the tensors that the configuration expects.
fn read_weights(path: &Path) -> Result<(), ModelError> {
    let weights = Weights::open(path)?;
    for name in weights.names() {
        weights.info(name);
    }
    weights.fingerprint()?;
    let config = ModelConfig::from_folder(path)?;
    for (name, shape) in config.tensor_shapes() {
        weights.check(&name, &shape)?;
        let mut row = vec![0.0; shape[1..].iter().product()];
        weights.read_rows(&name, &shape, shape[0] - 1..shape[0], &mut row)?;
    }
    Ok(())
}

/// Reads the input as model.safetensors, with a valid config.json. The first byte selects how the weights are quantised.
pub fn safetensors(data: &[u8]) {
    if let Err(error) = with_quantised(data, read_weights) {
        check_error(&error);
    }
}

fn with_quantised(data: &[u8], using: fn(&Path) -> Result<(), ModelError>) -> Result<(), ModelError> {
    let mut input = Input::new(data);
    let quantisation = QUANTISATIONS[usize::from(input.byte()) % QUANTISATIONS.len()];
    let config = CONFIG.replacen('{', &format!("{{\"quantization_config\": {quantisation},"), 1);
    let mut result = Ok(());
    let files = [("config.json", config.as_bytes()), ("model.safetensors", input.rest())];
    with_folder(&files, |folder| result = using(folder));
    result
}

/// Reads the input as a .gguf file: weights, configuration, tokenizer and template.
pub fn gguf(data: &[u8]) {
    with_folder(&[("model.gguf", data)], |folder| {
        let file = folder.join("model.gguf");
        if let Err(error) = read_weights(&file) {
            check_error(&error);
        }
        match text_files(&file) {
            // The tokenizer files made from the metadata are either valid, or rejected with an error.
            Ok(files) => drop(TextModel::from_files(&files)),
            Err(error) => check_error(&error),
        }
    });
}

/// Reads the input as a small file of a folder. The first byte selects the file.
pub fn model_folder(data: &[u8]) {
    let mut input = Input::new(data);
    let name = FILES[usize::from(input.byte()) % FILES.len()];
    let bytes = input.rest();
    match name {
        "config.json" => with_folder(&[(name, bytes)], |folder| match ModelConfig::from_folder(folder) {
            Ok(config) => check_config(&config),
            Err(error) => check_error(&error),
        }),
        "overfill.json" => with_folder(&[(name, bytes)], |folder| {
            if let Some(error) = Provenance::from_folder(folder).err() {
                check_error(&error);
            }
        }),
        "model.safetensors.index.json" => with_folder(&[(name, bytes)], |folder| {
            if let Some(error) = Weights::open(folder).err() {
                check_error(&error);
            }
        }),
        "tokenizer.model" => with_folder(&[(name, bytes)], |folder| match TextFiles::from_folder(folder) {
            // What was converted must be a valid tokenizer.json.
            Ok(files) => drop(TextModel::from_files(&files).expect("a tokenizer that was made here")),
            Err(error) => assert!(!error.to_string().is_empty(), "the error has no message"),
        }),
        // The tokenizer reader panics on some inputs. The code catches this, but libFuzzer would abort.
        "tokenizer.json" if cfg!(feature = "libfuzzer") => {}
        text_file => {
            let mut files = TextFiles { tokenizer_json: TOKENIZER.into(), ..TextFiles::default() };
            let bytes = bytes.to_vec();
            match text_file {
                "generation_config.json" => files.generation_config_json = Some(bytes),
                "tokenizer_config.json" => files.tokenizer_config_json = Some(bytes),
                "special_tokens_map.json" => files.special_tokens_map_json = Some(bytes),
                _ => files.tokenizer_json = bytes,
            }
            if let Ok(model) = TextModel::from_files(&files) {
                let _ = model.encode("a text", true).and_then(|ids| model.decode(&ids, true));
                let _ = model.apply_chat_template(&[ChatMessage::new("user", "hi")], true);
                // A decoder from an untrusted file may give other text piecewise than at once, but must not panic.
                if let Ok(mut decoder) = model.detokenizer(&[], false) {
                    (0..32).for_each(|id| drop(decoder.push(id)));
                    let _ = decoder.flush();
                }
            }
        }
    }
}

/// Checks that the functions that a node calls work on a configuration, and that it can be written and read again.
fn check_config(config: &ModelConfig) {
    let shapes = config.tensor_shapes();
    assert!(shapes.iter().all(|(name, shape)| !name.is_empty() && !shape.contains(&0)));
    assert_eq!(config.layers.len(), config.num_hidden_layers);
    assert!(config.inverse_frequencies().iter().all(|frequencies| frequencies.len() == config.rotary_dim / 2));
    assert!(config.inverse_frequencies().iter().flatten().all(|frequency| frequency.is_finite()));
    assert!(!config.rope_spec().scaling.is_empty());
    assert!([0, config.num_hidden_layers].contains(&config.layer_attention().len()));
    let cut = config.cut(1, 1, &[0]).to_json();
    let cut = ModelConfig::from_json(Path::new("config.json"), cut).expect("a configuration that was cut here");
    assert_eq!(cut.layers, config.layers[..1]);
    let json: Value = config.to_json();
    let again = ModelConfig::from_json(Path::new("config.json"), json).expect("a configuration that was written here");
    assert_eq!(again.tensor_shapes(), shapes);
    assert_eq!(
        (again.rope_spec(), again.layers, again.scales, again.max_position_embeddings),
        (config.rope_spec(), config.layers.clone(), config.scales, config.max_position_embeddings)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the mutations of a seed would test little.
    #[test]
    fn seeds_of_weights_are_read() {
        for (name, data) in crate::seeds::seeds("safetensors") {
            let read = with_quantised(&data, read_weights);
            assert!(read.is_ok(), "{name}: {read:?}");
        }
    }

    #[test]
    fn the_seed_of_a_tokenizer_is_converted() {
        let seeds = crate::seeds::seeds("model_folder");
        let (_, data) = seeds.iter().find(|(name, _)| name == "sentencepiece").expect("the seed");
        with_folder(&[("tokenizer.model", &data[1..])], |folder| {
            let files = TextFiles::from_folder(folder).expect("a valid tokenizer.model");
            let model = TextModel::from_files(&files).expect("a valid tokenizer.json");
            assert_eq!(model.encode("ab", false).expect("known letters"), [4]);
        });
    }
}
