use super::*;
use crate::RopeScaling;

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
    assert!(with("num_key_value_heads", json!(7)).contains("a divisor of num_attention_heads (24)"));
    assert!(with("hidden_size", json!(-1)).contains("hidden_size is -1"));
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

/// A configuration of this class, with these fields changed.
fn with(class: &str, fields: Value) -> Result<ModelConfig, ModelError> {
    let mut config = llama();
    config["architectures"] = json!([class]);
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    parse(config)
}

/// The windows of all layers, as runs.
fn windows(class: &str, fields: Value) -> Vec<(usize, Option<usize>)> {
    let config = with(class, fields).unwrap();
    assert_eq!(config.max_position_embeddings, 32768);
    config.layers.chunk_by(|a, b| a.window == b.window).map(|run| (run.len(), run[0].window)).collect()
}

#[test]
fn whether_a_window_counts_is_the_familys_rule() {
    let fields = |more: Value| {
        let mut fields = json!({"max_position_embeddings": 32768, "sliding_window": 4096, "num_hidden_layers": 4});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fields
    };
    let types = json!({"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]});
    let (window, none) = (Some(4096), None);
    assert_eq!(windows("LlamaForCausalLM", fields(json!({"use_sliding_window": true}))), [(4, none)]);
    assert_eq!(windows("MistralForCausalLM", fields(json!({}))), [(4, window)]);
    assert_eq!(windows("MistralForCausalLM", fields(json!({"sliding_window": null}))), [(4, none)]);
    for class in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        assert_eq!(windows(class, fields(json!({"use_sliding_window": false}))), [(4, none)]);
        let used = |more: Value| {
            let mut used = fields(json!({"use_sliding_window": true}));
            used.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            windows(class, used)
        };
        assert_eq!(used(json!({"max_window_layers": 1})), [(1, none), (3, window)]);
        assert_eq!(used(json!({"max_window_layers": 0})), [(4, window)]);
        assert_eq!(used(json!({})), [(4, none)]);
        assert_eq!(used(types.clone()), [(1, window), (2, none), (1, window)]);
    }
    assert_eq!(windows("Gemma2ForCausalLM", fields(json!({}))).len(), 4);
    assert_eq!(windows("Gemma2ForCausalLM", fields(types)), [(1, window), (2, none), (1, window)]);
    assert_eq!(windows("Gemma3ForCausalLM", fields(json!({"sliding_window_pattern": 4}))), [(3, window), (1, none)]);
}

#[test]
fn absent_fields_have_the_values_of_transformers() {
    let gemma = with("Gemma2ForCausalLM", json!({"head_dim": null})).unwrap();
    assert_eq!((gemma.head_dim, gemma.tie_word_embeddings, gemma.activation), (256, true, Activation::GeluTanh));
    assert_eq!((gemma.scales.logit_cap, gemma.layers[0].score_cap), (Some(30.0), Some(50.0)));
    assert_eq!((gemma.layers[0].score_scale, gemma.layers[0].window), (Some(1.0 / 16.0), Some(4096)));
    assert_eq!(gemma.embedding_scale(), 1689_f64.sqrt());
    assert_eq!(gemma.cut(81, 9, &[0]).embedding_scale(), 9.0);
    // null is not the same as absent.
    let nulls = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null, "sliding_window": null});
    let plain = with("Gemma2ForCausalLM", nulls).unwrap();
    assert_eq!((plain.scales.logit_cap, plain.layers[0].score_cap, plain.layers[0].window), (None, None, None));
    let gemma3 = with("Gemma3ForCausalLM", json!({})).unwrap();
    assert_eq!(gemma3.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [1e6, 1e4]);
    let smol = with("SmolLM3ForCausalLM", json!({"tie_word_embeddings": null})).unwrap();
    assert_eq!((smol.layers[2].rope, smol.layers[3].rope, smol.tie_word_embeddings), (Some(0), None, true));
    let granite = with("GraniteForCausalLM", json!({"logits_scaling": 8.0})).unwrap();
    assert_eq!((granite.scales.logits, granite.layers[0].score_scale), (0.125, Some(1.0)));
    let phi = with("Phi3ForCausalLM", json!({"partial_rotary_factor": 0.75, "rms_norm_eps": null})).unwrap();
    assert_eq!((phi.rotary_dim, phi.head_dim, phi.rms_norm_eps), (96, 128, 1e-5));
}

/// transformers 5 writes all of this into `rope_parameters`.
#[test]
fn parameters_of_ropes_may_be_nested() {
    let linear = json!({"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5});
    let parameters = json!({"full_attention": linear, "sliding_attention": {"rope_theta": 2e4}});
    let config = with("Gemma3ForCausalLM", json!({ "rope_parameters": parameters })).unwrap();
    let scaling = [RopeScaling::Linear { factor: 8.0 }, RopeScaling::None];
    let expected = [5e5, 2e4].into_iter().zip(scaling).map(|(theta, scaling)| Rope { theta, scaling });
    assert_eq!(config.ropes, expected.collect::<Vec<_>>());
    let parameters = json!({"partial_rotary_factor": 0.75, "rope_theta": 1e5});
    let config = with("Phi3ForCausalLM", json!({ "rope_parameters": parameters })).unwrap();
    assert_eq!((config.rotary_dim, config.ropes[0].theta), (96, 1e5));
    let error = with("LlamaForCausalLM", json!({ "rope_parameters": parameters })).unwrap_err().to_string();
    assert!(error.contains("partial_rotary_factor is 0.75, supported: 1 for this family"), "{error}");
}

#[test]
fn contexts_grow_with_their_scaling() {
    let context = |scaling: Value| {
        let fields = json!({"max_position_embeddings": 4096, "rope_scaling": scaling});
        with("LlamaForCausalLM", fields).unwrap().max_position_embeddings
    };
    assert_eq!(context(Value::Null), 4096);
    assert_eq!(context(json!({"rope_type": "linear", "factor": 4.0})), 4096);
    assert_eq!(context(json!({"rope_type": "dynamic", "factor": 4.0})), 16384);
    assert_eq!(context(json!({"rope_type": "yarn", "factor": 4.0})), 16384);
    let original = |n: usize| json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": n});
    assert_eq!((context(original(1024)), context(original(512))), (4096, 4096));
}

#[test]
fn what_a_family_can_not_be_is_named() {
    let llama = "LlamaForCausalLM";
    let long = |field: &str, factors: Value| {
        let mut scaling = json!({"type": "longrope", "short_factor": vec![1.0; 64], "long_factor": vec![1.0; 64]});
        scaling[field] = factors;
        json!({ "rope_scaling": scaling })
    };
    for (class, fields, expected) in [
        (llama, json!({"hidden_act": "relu"}), r#"hidden_act is "relu", supported: silu, gelu_pytorch_tanh"#),
        (
            "Gemma2ForCausalLM",
            json!({"hidden_activation": "gelu"}),
            r#"hidden_activation is "gelu", supported: silu, "#,
        ),
        (llama, json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5, supported: 1 for this family"),
        ("Phi3ForCausalLM", json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor is 1.5, supported: a number"),
        (
            "Phi3ForCausalLM",
            json!({"partial_rotary_factor": 0.01}),
            "supported: a part of head_dim (128) that is an even",
        ),
        (
            "Phi3ForCausalLM",
            long("long_factor", json!([1.0])),
            "number of elements of long_factor is 1, supported: half",
        ),
        (
            "Phi3ForCausalLM",
            long("short_factor", json!([0.0])),
            "short_factor is [0.0], supported: a list of numbers from",
        ),
        (
            "Phi3ForCausalLM",
            long("attention_factor", json!(0)),
            "attention_factor is 0, supported: a number from 0.001",
        ),
        (
            "Gemma2ForCausalLM",
            json!({"layer_types": ["full_attention"]}),
            "layer_types is a list of 1, supported: a list",
        ),
        (
            "Gemma2ForCausalLM",
            json!({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}),
            r#"layer_types is "chunked_attention", supported: sliding_attention, full_attention"#,
        ),
        ("Gemma2ForCausalLM", json!({"sliding_window": 0}), "sliding_window is 0, supported: a whole number from 1"),
        ("Gemma2ForCausalLM", json!({"attn_logit_softcapping": 0}), "attn_logit_softcapping is 0, supported: a number"),
        (
            "Gemma2ForCausalLM",
            json!({"final_logit_softcapping": -3}),
            "final_logit_softcapping is -3, supported: a num",
        ),
        ("Gemma2ForCausalLM", json!({"query_pre_attn_scalar": -1}), "query_pre_attn_scalar is -1, supported: a number"),
        ("Gemma3ForCausalLM", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention is true"),
        ("Gemma3ForCausalLM", json!({"sliding_window_pattern": 0}), "sliding_window_pattern is 0, supported: a whole"),
        ("Gemma3ForCausalLM", json!({"rope_local_base_freq": 0}), "rope_local_base_freq is 0, supported: a positive"),
        (
            "SmolLM3ForCausalLM",
            json!({"no_rope_layers": [1]}),
            r#"no_rope_layers is "a list of 1", supported: a list of"#,
        ),
        ("SmolLM3ForCausalLM", json!({"no_rope_layer_interval": 0}), "no_rope_layer_interval is 0, supported: a whole"),
        ("GraniteForCausalLM", json!({"logits_scaling": 0}), "logits_scaling is 0, supported: a number from 0.000001"),
        (
            "GraniteForCausalLM",
            json!({"residual_multiplier": 1e9}),
            "residual_multiplier is 1000000000.0, supported: a",
        ),
        (
            "Qwen2ForCausalLM",
            json!({"max_window_layers": -1}),
            "max_window_layers is -1, supported: a whole number from 0",
        ),
        (llama, json!({"rope_scaling": {"rope_type": "yarn"}}), "factor is absent, supported: a number from 0.001"),
        (llama, json!({"rope_scaling": {"rope_type": "ntk"}}), "rope_type is ntk, supported: default, linear, dynamic"),
        (llama, json!({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}), "factor is 0.5, supported: a number"),
        (
            llama,
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 1e6}}),
            "supported: a factor for a context of",
        ),
        (
            llama,
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 1e6}}),
            "supported: a factor for a context of up",
        ),
        (
            llama,
            json!({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}),
            "rope_theta is 1, supported",
        ),
        (llama, json!({"rope_theta": 1e-300}), "rope_theta is 1e-300, supported: values that give finite frequencies"),
        (
            llama,
            json!({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}),
            "rope_type is dynamic, supported: 4 or more rotated channels per head",
        ),
    ] {
        let error = with(class, fields).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}\n  has not: {expected}");
    }
}
