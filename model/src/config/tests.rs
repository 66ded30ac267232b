use super::*;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1689, "intermediate_size": 4505,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": true, "rms_norm_eps": 1e-5
    })
}

fn parse(value: Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(Path::new("m/config.json"), value)
}

#[test]
fn heads_need_not_fill_the_hidden_size() {
    let config = parse(llama()).unwrap();
    assert_ne!(config.head_dim * config.num_attention_heads, config.hidden_size);
    let q = config.tensor_shapes().into_iter().find(|(n, _)| n.ends_with("0.self_attn.q_proj.weight")).unwrap();
    assert_eq!(q.1, [3072, 1689]);
    assert_eq!(
        parse(config.to_json()).unwrap(),
        ModelConfig { raw: config.to_json().as_object().unwrap().clone(), ..config }
    );
}

#[test]
fn faults_name_file_field_and_values() {
    let with = |field: &str, value: Value| {
        let mut config = llama();
        config[field] = value;
        parse(config).unwrap_err().to_string()
    };
    assert!(
        with("architectures", json!(["GPT2LMHeadModel"]))
            .starts_with("m/config.json: architectures is [\"GPT2LMHeadModel\"], supported: Llama")
    );
    assert!(with("hidden_act", json!("gelu")).contains("hidden_act is \"gelu\", supported: silu"));
    assert!(with("num_key_value_heads", json!(7)).contains("a divisor of num_attention_heads (24)"));
    assert!(with("hidden_size", json!(-1)).contains("hidden_size is -1"));
    assert!(with("rope_scaling", json!({"rope_type": "yarn"})).contains("rope_type is yarn"));
    assert!(with("num_hidden_layers", json!(16_777_216)).ends_with("supported: a whole number from 1 to 1024"));
    assert!(with("head_dim", json!(4098)).ends_with("supported: a whole number from 1 to 4096"));
}

#[test]
fn both_spellings_of_rope_are_read() {
    let llama3 = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0});
    let mut old = llama();
    old["rope_theta"] = json!(500000.0);
    old["rope_scaling"] = llama3.clone();
    let mut new = llama();
    new["rope_parameters"] = llama3;
    assert_eq!(parse(old).unwrap().rope_spec(), parse(new).unwrap().rope_spec());
}

#[test]
fn frequencies_are_f32_whatever_the_weights_are() {
    let with = |field: &str, dtype: &str| {
        let mut config = llama();
        config[field] = json!(dtype);
        parse(config)
    };
    let plain = parse(llama()).unwrap();
    for (field, dtype) in [
        ("torch_dtype", "bfloat16"),
        ("dtype", "bfloat16"),
        ("dtype", "float16"),
        ("dtype", "float32"),
        (ROPE_FREQUENCY_DTYPE, "float32"),
    ] {
        let config = with(field, dtype).unwrap();
        assert_eq!(config.inverse_frequencies(), plain.inverse_frequencies(), "{field} {dtype}");
        assert_eq!(config.rope_spec(), plain.rope_spec(), "{field} {dtype}");
        assert_eq!(config.to_json().get(ROPE_FREQUENCY_DTYPE), None);
    }
    let e = with(ROPE_FREQUENCY_DTYPE, "bfloat16").unwrap_err().to_string();
    assert_eq!(e, "m/config.json: rope_frequency_dtype is \"bfloat16\", supported: float32");
}

#[test]
fn a_sliding_window_bounds_the_context() {
    let mut config = llama();
    config["architectures"] = json!(["MistralForCausalLM"]);
    config["max_position_embeddings"] = json!(32768);
    config["sliding_window"] = json!(4096);
    assert_eq!(parse(config).unwrap().max_position_embeddings, 4096);
}

#[test]
fn whether_a_window_counts_is_the_familys_rule() {
    let context = |class: &str, used: Value| {
        let mut config = llama();
        config["architectures"] = json!([class]);
        config["max_position_embeddings"] = json!(32768);
        config["sliding_window"] = json!(4096);
        config["use_sliding_window"] = used;
        parse(config).unwrap().max_position_embeddings
    };
    assert_eq!(context("LlamaForCausalLM", json!(true)), 32768);
    for class in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        assert_eq!(context(class, json!(true)), 4096);
        assert_eq!(context(class, json!(false)), 32768);
    }
}
