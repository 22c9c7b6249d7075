//! Every family that is written is read back as the same model, and written again as the same folder.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};

use crate::{
    Activation, Checkpoint, Config, Format, MlpKind, ModelInfo, Pool, PreLogits, PreprocessConfig, VisionTransformer,
    vit::weights::tensor,
};

fn vit() -> Config {
    Config { num_classes: 3, ln_eps: 1e-12, ..Config::vit([32, 32], [16, 16], 16, 2, 2) }
}

fn families() -> Vec<(&'static str, Config)> {
    let features = Config { num_classes: 0, ..vit() };
    let dino = Config { layer_scale: true, ln_eps: 1e-6, ..features.clone() };
    let tower = Config { act: Activation::QuickGelu, ln_eps: 1e-5, ..features.clone() };
    let siglip = Config { class_token: false, act: Activation::GeluTanh, ln_eps: 1e-6, ..features.clone() };
    vec![
        ("vit", vit()),
        ("vit without a bias of q, k, v", Config { qkv_bias: false, ..vit() }),
        ("vit with a pooler", Config { pre_logits: Some(PreLogits::tanh(5)), ..features }),
        ("deit", Config { dist_token: true, ..vit() }),
        ("dinov2", dino.clone()),
        ("dinov2 with a head", Config { num_classes: 3, global_pool: Pool::TokenAvg, ..dino.clone() }),
        ("registers", Config { reg_tokens: 2, no_embed_class: true, ..dino.clone() }),
        ("swiglu", Config { mlp: MlpKind::SwigluPacked, act: Activation::Silu, mlp_hidden: 96, ..dino }),
        ("clip", Config { pre_norm: true, patch_bias: false, head_bias: false, num_classes: 3, ..tower }),
        ("siglip", Config { global_pool: Pool::Map, ..siglip.clone() }),
        ("siglip with a head", Config { global_pool: Pool::Avg, num_classes: 3, ..siglip }),
    ]
}

#[test]
fn what_is_written_is_read_and_written_again_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (name, config) in families() {
        let vars = VarMap::new();
        VisionTransformer::new(&config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)).unwrap();
        let info = ModelInfo::new(config.clone(), PreprocessConfig::for_config(&config));
        let model = Checkpoint::from_var_map(info, &vars).unwrap();
        let [first, second] = ["1", "2"].map(|end| folder.path().join(format!("{name} {end}")));
        model.save(&first, Format::Transformers).unwrap_or_else(|e| panic!("{name}: {e}"));
        let read = Checkpoint::open(&first).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(read.info.model, config, "{name}");
        for (tensor_name, info) in model.weights.tensors() {
            assert_eq!(read.weights.tensors()[tensor_name].shape, info.shape, "{name}: {tensor_name}");
            // a class token that carries its position is a sum, here with zeros
            let values = |c: &Checkpoint| {
                let tensor = tensor(c.weights.as_ref(), tensor_name, DType::F32, &Device::Cpu).unwrap();
                tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert_eq!(values(&read), values(&model), "{name}: {tensor_name}");
        }
        read.save(&second, Format::Transformers).unwrap();
        for file in ["config.json", "preprocessor_config.json", "model.safetensors"] {
            let [one, two] = [&first, &second].map(|folder| std::fs::read(folder.join(file)).unwrap());
            assert!(one == two, "{name}: another {file}");
        }
    }
}

#[test]
fn biases_that_a_class_of_transformers_always_has_are_written_as_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let bare = Config { proj_bias: false, patch_bias: false, head_bias: false, ..vit() };
    let tower = Config { qkv_bias: false, proj_bias: false, class_token: false, global_pool: Pool::Avg, ..vit() };
    for (name, config) in [("vit", bare), ("siglip", tower)] {
        let vars = VarMap::new();
        let model = VisionTransformer::new(&config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)).unwrap();
        let info = ModelInfo::new(config.clone(), PreprocessConfig::for_config(&config));
        let saved = folder.path().join(name);
        Checkpoint::from_var_map(info, &vars).unwrap().save(&saved, Format::Transformers).unwrap();
        let read = Checkpoint::open(&saved).unwrap();
        assert!(read.info.model.proj_bias && read.info.model.head_bias && read.info.model.patch_bias, "{name}");
        let read = read.model(DType::F32, &Device::Cpu).unwrap();
        let x = candle_core::Tensor::randn(0f32, 1.0, (1, 3, 32, 32), &Device::Cpu).unwrap();
        let [one, two] =
            [&model, &read].map(|m| m.forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
        // a bias is one more column of the product, whose sums are then in another order
        let far = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-6, "{name}: {far:e}");
    }
}
