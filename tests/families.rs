//! The guide's table of families and what is supported of each: measured on the fixtures, not written by hand.
//!
//! The test fails if the guide says something else; with `VIT_BLESS=1` it writes what it found.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use vit_model::{
    VisionTransformer,
    checkpoint::{self, Checkpoint},
    engine,
    vit::intermediates::{FeatureFormat, FinalNorm},
    vit::pos_embed::Resample,
    vit::tap::Blocks,
};

use crate::support;

/// A family, and its fixtures: `library/name`.
const ROWS: [(&str, &[&str]); 24] = [
    (
        "ViT, AugReg; ImageNet-21k",
        &["timm/vit_base_patch16_224", "hf/vit_cls", "hf/vit_cls_f16", "torchvision/plain", "torchvision/pre_logits"],
    ),
    ("DeiT, distilled", &["timm/deit_base_distilled_patch16_224", "hf/deit_cls"]),
    ("DeiT III", &["timm/deit3_small_patch16_224"]),
    ("MAE, I-JEPA; mean of the patches", &["timm/vit_huge_patch14_gap_224", "hf/mae_model"]),
    ("DINOv2 (giant: packed SwiGLU)", &["timm/vit_giant_patch14_dinov2", "hf/dinov2_cls"]),
    ("DINOv2 with registers", &["timm/vit_base_patch14_reg4_dinov2", "hf/dinov2_reg_model"]),
    ("CLIP", &["timm/vit_base_patch32_clip_quickgelu_224", "hf/clip_vision"]),
    (
        "SigLIP, SigLIP 2; attention pooling",
        &["timm/vit_base_patch16_siglip_224", "hf/siglip_vision", "hf/siglip_vision_v4"],
    ),
    ("AIMv2; RMSNorm, SwiGLU", &["timm/aimv2_large_patch14_224"]),
    ("BEiT-3; norms inside attention and MLP", &["timm/beit3_base_patch16_224"]),
    ("FlexiViT", &["timm/flexivit_small"]),
    ("RADIO; no final norm", &["timm/vit_base_patch16_radio_v3"]),
    ("RMSNorm, registers (`test_vit4`)", &["timm/test_vit4"]),
    ("ResPost blocks (`rpn`)", &["timm/vit_base_patch16_rpn_224"]),
    (
        "parallel attention and MLP (`xp`, `pwee`)",
        &["timm/vit_base_patch16_xp_224", "timm/vit_pwee_patch16_reg1_gap_256"],
    ),
    ("two attentions, two MLPs (`18x2`)", &["timm/vit_small_patch16_18x2_224"]),
    (
        "differential attention (`dwee`, `dpwee`)",
        &["timm/vit_dwee_patch16_reg1_gap_256", "timm/vit_dpwee_patch16_reg1_gap_256"],
    ),
    ("EVA-02; rotary positions, gated MLP", &["timm/eva02_base_patch14_224", "timm/eva02_enormous_patch14_clip_224"]),
    ("DINOv3; centred rotary positions", &["timm/vit_small_plus_patch16_dinov3_qkvb", "hf/dinov3_vit"]),
    ("RoPE-ViT, axial", &["timm/vit_base_patch16_rope_224"]),
    ("RoPE-ViT, learned frequencies", &["timm/vit_base_patch16_rope_mixed_ape_224"]),
    ("Perception Encoder", &["timm/vit_pe_core_base_patch16_224"]),
    ("Sapiens2; grouped queries", &["timm/vit_large_patch16_sapiens2"]),
    ("BEiT; relative positions", &["timm/beit_base_patch16_224"]),
];

/// Heads of torchvision's fixtures; they are not in the file.
const TORCHVISION_HEADS: usize = 3;

/// What is found of one model.
type Found<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// A folder with its input and the other library's answers.
struct Case {
    checkpoint: Checkpoint,
    model: VisionTransformer,
    expect: HashMap<String, Tensor>,
    compare: Vec<String>,
}

impl Case {
    fn open(folder: &Path) -> Found<Self> {
        let checkpoint = if folder.parent().is_some_and(|library| library.ends_with("torchvision")) {
            checkpoint::torchvision(&folder.join("model.safetensors"), TORCHVISION_HEADS)?
        } else {
            checkpoint::open(folder)?
        };
        let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("meta.json"))?)?;
        let compare: Vec<String> = serde_json::from_value(meta["compare"].clone())?;
        let expect = candle_core::safetensors::load(folder.join("expect.safetensors"), &Device::Cpu)?;
        let model = checkpoint.model(DType::F32, &Device::Cpu)?;
        Ok(Self { checkpoint, model, expect, compare })
    }

    fn x(&self) -> &Tensor {
        &self.expect["x"]
    }

    /// Answers against the other library's; as exact as tests/parity.rs asks for.
    fn same(&self, have: [(&str, Option<&Tensor>); 3]) -> Found<f32> {
        let mut worst = 0.0_f32;
        for name in &self.compare {
            let Some(have) = have.iter().find(|(n, _)| n == name).and_then(|(_, t)| *t) else { continue };
            let want = &self.expect[name];
            let scale = max(want)?.min(1.0);
            let have = have.reshape(want.dims())?;
            let far = max(&(have - want)?)? / scale;
            worst = if far.is_nan() { f32::INFINITY } else { worst.max(far) };
        }
        if worst <= 1e-4 { Ok(worst) } else { Err(format!("differs by {worst:.1e}").into()) }
    }

    /// Candle's modules.
    fn answers(&self) -> Found<f32> {
        let features = self.model.forward_features(self.x())?;
        let (pre, logits) = (self.model.forward_pre_logits(&features)?, self.model.forward_head(&features)?);
        let logits = (self.model.config().num_classes > 0).then_some(&logits);
        self.same([("features", Some(&features)), ("pre_logits", Some(&pre)), ("logits", logits)])
    }

    /// The engine, in f32.
    fn engine(&self) -> Found<f32> {
        let options =
            engine::EngineOptions { precision: vit_model::Precision::F32, ..engine::EngineOptions::default() };
        let engine = engine::Engine::new(&self.checkpoint.info.model, &*self.checkpoint.weights, &options)?;
        let out = engine.forward(&self.x().flatten_all()?.to_vec1::<f32>()?, self.x().dim(0)?)?;
        let tensor = |values: Vec<f32>| {
            let len = values.len();
            Tensor::from_vec(values, len, &Device::Cpu)
        };
        let (features, pre) = (tensor(out.features)?, tensor(out.pre_logits)?);
        let logits = out.logits.map(tensor).transpose()?;
        self.same([("features", Some(&features)), ("pre_logits", Some(&pre)), ("logits", logits.as_ref())])
    }

    /// The tokens that leave the last block, normed, are the features; attention maps of every block, rows of a sum of 1
    /// (where no second attention is subtracted).
    fn inside(&self) -> Found {
        let (config, x) = (self.model.config(), self.x());
        let (features, blocks) =
            self.model.forward_intermediates(x, Blocks::All, FinalNorm::Apply, FeatureFormat::Nlc)?;
        let last = blocks.last().ok_or("no block")?;
        let tokens = Tensor::cat(&last.prefix.iter().chain([&last.patches]).collect::<Vec<_>>(), 1)?;
        if blocks.len() != config.depth || max(&(tokens - features)?)? != 0.0 {
            return Err("the last block's tokens are not the features".into());
        }
        let maps = self.model.attention_maps(x)?;
        for map in &maps {
            let rows = max(&(map.sum(3)? - 1.0)?)?;
            let (b, n) = (x.dim(0)?, config.num_tokens());
            let differential = config.diff_attn || config.block == vit_model::BlockKind::DiffParallelScaling;
            if map.dims() != [b, config.num_heads, n, n] || !differential && rows > 1e-5 {
                return Err(format!("a map of {:?}, rows off by {rows}", map.dims()).into());
            }
        }
        if maps.is_empty() || !maps.len().is_multiple_of(config.depth) {
            return Err(format!("{} maps of {} blocks", maps.len(), config.depth).into());
        }
        Ok(())
    }

    /// An image of one more row of patches and one fewer column.
    fn other_size(&self) -> Found {
        let mut model = self.model.clone();
        let ([h, w], [ph, pw]) = (model.config().img_size, model.config().patch_size);
        let size = [h + ph, w - pw];
        model.set_input_size(size, Resample::of(&self.checkpoint.info))?;
        let x = self.x().narrow(3, 0, size[1])?.pad_with_same(2, 0, ph)?;
        let (rows, columns) = (size[0] / ph, size[1] / pw);
        let features = model.forward_features(&x)?;
        let n = model.config().num_prefix_tokens() + rows * columns;
        let good = features.dims() == [x.dim(0)?, n, model.config().embed_dim] && max(&features)?.is_finite();
        if good { Ok(()) } else { Err(format!("tokens {:?}", features.dims()).into()) }
    }

    /// The derivative along two random directions through all parameters at once, against a finite difference, in f64.
    fn trains(&self) -> Found {
        let config = &self.checkpoint.info.model;
        let map = VarMap::new();
        let model = VisionTransformer::new(config, VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu))?;
        let mut vars: Vec<(String, Var)> =
            map.data().lock().unwrap().iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, var) in &vars {
            let values = Tensor::from_vec(self.checkpoint.weights.read_f32(name)?, var.dims(), &Device::Cpu)?;
            var.set(&values.to_dtype(DType::F64)?)?;
        }
        let x = self.x().to_dtype(DType::F64)?;
        let mut random = support::Random(1);
        let shape = model.forward(&x)?.dims().to_vec();
        let weights = noise(&mut random, &shape)?;
        let loss = || -> candle_core::Result<Tensor> {
            (model.forward(&x).map_err(candle_core::Error::wrap)? * &weights)?.sum_all()
        };
        let grads = loss()?.backward()?;
        let start: Vec<Tensor> = vars.iter().map(|(_, var)| var.as_tensor().copy()).collect::<Result<_, _>>()?;
        for _ in 0..2 {
            // a step in proportion to what a parameter is, so that none bends the loss
            let size = |t: &Tensor| -> candle_core::Result<f64> { t.sqr()?.mean_all()?.sqrt()?.to_scalar() };
            let direction = |t: &Tensor| noise(&mut random, t.dims())? * (size(t)? + 1e-3);
            let directions = start.iter().map(direction).collect::<candle_core::Result<Vec<Tensor>>>()?;
            let (mut slope, mut total) = (0.0, 0.0);
            for ((name, var), direction) in vars.iter().zip(&directions) {
                let grad = grads.get(var).ok_or_else(|| format!("`{name}` has no gradient"))?;
                let part: f64 = (grad * direction)?.sum_all()?.to_scalar()?;
                slope += part;
                total += part.abs();
            }
            let step = 1e-6;
            let at = |h: f64| -> candle_core::Result<f64> {
                for (((_, var), here), direction) in vars.iter().zip(&start).zip(&directions) {
                    var.set(&(here + (direction * h)?)?)?;
                }
                loss()?.to_scalar()
            };
            let difference = (at(step)? - at(-step)?) / (2.0 * step);
            at(0.0)?;
            // off by the square of the step times the third derivative, and by the rounding of a loss over the step
            let off = (slope - difference).abs();
            if off.is_nan() || off > 1e-6 * total {
                return Err(format!("slope {slope}, finite difference {difference}").into());
            }
        }
        Ok(())
    }
}

fn max(t: &Tensor) -> candle_core::Result<f32> {
    t.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// Values between −1 and 1.
fn noise(random: &mut support::Random, shape: &[usize]) -> candle_core::Result<Tensor> {
    let value = |_| random.below(1 << 40) as f64 / (1u64 << 39) as f64 - 1.0;
    Tensor::from_vec((0..shape.iter().product()).map(value).collect::<Vec<f64>>(), shape, &Device::Cpu)
}

/// `yes`, or a dash and why not, on stderr.
fn cell<T>(what: &str, found: impl IntoIterator<Item = (PathBuf, Found<T>)>) -> &'static str {
    let (mut tried, mut good) = (0, 0);
    for (folder, found) in found {
        tried += 1;
        match found {
            Ok(_) => good += 1,
            Err(why) => eprintln!("{} {what}: {why}", folder.display()),
        }
    }
    match (tried, good) {
        (0, _) => "",
        (tried, good) if tried == good => "yes",
        (_, 0) => "–",
        _ => "some",
    }
}

/// `timm, transformers`: whose files load; those that do not are refused, with the reason.
fn loads(cases: &[(PathBuf, Found<Case>)]) -> String {
    let mut libraries: Vec<(&str, bool)> = Vec::new();
    for (folder, case) in cases {
        let library = match folder.parent().and_then(Path::file_name).and_then(std::ffi::OsStr::to_str) {
            Some("hf") => "transformers",
            Some("torchvision") => "torchvision",
            _ => "timm",
        };
        if let Err(why) = case {
            eprintln!("{} loads: {why}", folder.display());
        }
        match libraries.iter_mut().find(|(name, _)| *name == library) {
            Some((_, good)) => *good &= case.is_ok(),
            None => libraries.push((library, case.is_ok())),
        }
    }
    let shown = libraries.iter().map(|(name, good)| if *good { (*name).into() } else { format!("{name}: refused") });
    shown.collect::<Vec<_>>().join(", ")
}

fn table() -> String {
    let mut text = String::from(
        "| family | loads what these save | answers | tokens and maps of blocks | other image sizes | trains | CPU engine |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for (label, names) in ROWS {
        let parity = support::root().join("tests/fixtures/parity");
        let cases: Vec<_> = names.iter().map(|name| parity.join(name)).map(|f| (f.clone(), Case::open(&f))).collect();
        let open = || cases.iter().filter_map(|(folder, case)| Some((folder.clone(), case.as_ref().ok()?)));
        let row = [
            label.into(),
            loads(&cases),
            cell("answers", open().map(|(f, case)| (f, case.answers()))).into(),
            cell("inside", open().map(|(f, case)| (f, case.inside()))).into(),
            cell("other size", open().map(|(f, case)| (f, case.other_size()))).into(),
            cell("trains", open().map(|(f, case)| (f, case.trains()))).into(),
            cell("engine", open().map(|(f, case)| (f, case.engine()))).into(),
        ];
        writeln!(text, "| {} |", row.join(" | ")).unwrap();
    }
    text
}

#[test]
fn the_guide_says_what_is_supported() {
    support::guide_block("models.md", "families", &table());
}
