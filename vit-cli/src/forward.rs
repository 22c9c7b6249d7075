//! `forward`: a tensor in; logits, features and pre_logits out.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use vit_model::{ModelInfo, Predictor};

use crate::args::ForwardArgs;
use crate::model;
use crate::output::{escape, show};
use crate::save::{self, F32};

/// Images of one run of the model; more of them are run one after the other.
const BATCH: usize = 16;

/// Most bytes of a file with inputs.
const MAX_INPUT: u64 = 4 << 30;

pub fn run(args: &ForwardArgs, verbose: bool) -> anyhow::Result<()> {
    let (name, x) = load(&args.input, args.tensor.as_deref()).with_context(|| show(&args.input))?;
    let once = x.dims().first() == Some(&1);
    let predictor = model::predictor_for(&args.model, args.run, once, verbose, |info| fit(info, x.dims()))?;
    let (pixels, batch) = pixels(&name, &x, predictor.info()).with_context(|| show(&args.input))?;
    let output = forward(&predictor, &pixels, batch).map_err(|e| model::named(&args.model, e))?;
    let [logits, features, pre_logits] = predictor.shapes(batch);
    let mut tensors = vec![
        F32 { name: "features", shape: features, values: &output.features },
        F32 { name: "pre_logits", shape: pre_logits, values: &output.pre_logits },
    ];
    match &output.logits {
        Some(values) => tensors.push(F32 { name: "logits", shape: logits, values }),
        // without a head the model's answer is what the head would read, as in timm
        None => tensors.push(F32 { name: "logits", shape: tensors[1].shape.clone(), values: &output.pre_logits }),
    }
    let model = PathBuf::from(&args.model);
    let inputs = [&*args.input, &*model, &*model.join("model.safetensors"), &*model.join("config.json")];
    save::safetensors(&args.output, &inputs, &tensors, &[])
}

/// Any number of images, a bounded number at a time.
pub fn forward(predictor: &Predictor, pixels: &[f32], batch: usize) -> vit_model::Result<vit_model::predictor::Output> {
    let image = pixels.len() / batch.max(1);
    let mut all = vit_model::predictor::Output { logits: None, features: Vec::new(), pre_logits: Vec::new() };
    for pixels in pixels.chunks(BATCH * image.max(1)) {
        let part = predictor.forward(pixels, pixels.len() / image.max(1))?;
        if let Some(logits) = part.logits {
            all.logits.get_or_insert_default().extend(logits);
        }
        all.features.extend(part.features);
        all.pre_logits.extend(part.pre_logits);
    }
    Ok(all)
}

/// The input tensor `[B, C, H, W]`, normalised, and B.
pub fn read_input(path: &Path, tensor: Option<&str>, info: &ModelInfo) -> anyhow::Result<(Vec<f32>, usize)> {
    load(path, tensor).and_then(|(name, x)| pixels(&name, &x, info)).with_context(|| show(path))
}

/// Where the file that a model was converted from left its image size open, the input decides between sizes of as many
/// patches: nothing else of the model depends on it.
fn fit(info: &mut ModelInfo, dims: &[usize]) {
    let &[_, _, h, w] = dims else { return };
    let ([ph, pw], patches) = (info.model.patch_size, info.model.num_patches());
    if info.source.contains_key("assumed")
        && h % ph == 0
        && w % pw == 0
        && (h / ph).checked_mul(w / pw) == Some(patches)
    {
        info.model.img_size = [h, w];
        info.preprocess.input_size = [info.model.in_chans, h, w];
    }
}

/// The input tensor and its name.
fn load(path: &Path, tensor: Option<&str>) -> anyhow::Result<(String, Tensor)> {
    let meta = std::fs::metadata(path)?;
    if !meta.is_file() {
        bail!("not a regular file");
    }
    if meta.len() > MAX_INPUT {
        bail!("{} bytes, at most {MAX_INPUT} are read", meta.len());
    }
    let file = BufferedSafetensors::new(std::fs::read(path)?).context("not a safetensors file")?;
    let names: Vec<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
    let listed = || names.iter().take(8).map(|n| escape(n)).collect::<Vec<_>>().join(", ");
    let name = match (tensor, names.as_slice()) {
        (Some(name), _) if names.iter().any(|n| n == name) => name,
        (Some(name), _) => bail!("no tensor `{}`; there are: {}", escape(name), listed()),
        (None, [only]) => only,
        (None, _) if names.iter().any(|n| n == "x") => "x",
        (None, _) => bail!("no tensor `x`; name one with --tensor: {}", listed()),
    };
    Ok((name.to_owned(), file.load(name, &Device::Cpu)?))
}

/// The input as the model reads it: `[B, C, H, W]`, normalised, and B.
fn pixels(name: &str, x: &Tensor, info: &ModelInfo) -> anyhow::Result<(Vec<f32>, usize)> {
    let ([h, w], c) = (info.model.img_size, info.model.in_chans);
    let what = || format!("tensor `{}`: the model reads [B, {c}, {h}, {w}], found {:?}", escape(name), x.dims());
    let (batch, image) = match *x.dims() {
        [b, d1, d2, d3] if b > 0 => (b, [d1, d2, d3]),
        _ => bail!(what()),
    };
    let x = match x.dtype() {
        DType::U8 if image == [c, h, w] => normalise(x, info)?,
        DType::U8 if image == [h, w, c] => normalise(&x.permute((0, 3, 1, 2))?, info)?,
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 if image == [c, h, w] => x.clone(),
        // as TensorFlow's models and their exports have it
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 if image == [h, w, c] => x.permute((0, 3, 1, 2))?,
        DType::U8 | DType::F32 | DType::F16 | DType::BF16 | DType::F64 => bail!(what()),
        dtype => bail!("tensor `{}`: expected floats or u8, found {}", escape(name), dtype.as_str()),
    };
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        bail!("tensor `{}`: {} at index {at}", escape(name), values[at]);
    }
    Ok((values, batch))
}

/// Pixels of `[B, C, H, W]` u8 as the model's own preprocessing normalises them: `(x / 255 − mean) / std`.
fn normalise(x: &Tensor, info: &ModelInfo) -> anyhow::Result<Tensor> {
    let per_channel = |values: &[f64]| -> anyhow::Result<Tensor> {
        if values.len() != info.model.in_chans {
            bail!("the model has {} channels, and {} values of mean or std", info.model.in_chans, values.len());
        }
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        Ok(Tensor::from_vec(values, (1, info.model.in_chans, 1, 1), &Device::Cpu)?)
    };
    let (mean, std) = (per_channel(&info.preprocess.mean)?, per_channel(&info.preprocess.std)?);
    let x = (x.to_dtype(DType::F32)? / 255.0)?;
    Ok(x.broadcast_sub(&mean)?.broadcast_div(&std)?)
}
