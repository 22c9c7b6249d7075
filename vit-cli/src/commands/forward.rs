//! `forward`: a tensor or texts in; logits, features and embeddings out.

use std::path::Path;

use anyhow::{Context as _, bail};
use vit_model::candle::safetensors::BufferedSafetensors;
use vit_model::candle::{Device, Tensor};
use vit_model::checkpoint::Values;
use vit_model::predictor::{Output, Wanted};
use vit_model::{Error, ModelInfo, Predictor, TextModel, inputs};

use crate::args::ForwardArgs;
use crate::output::{escape, show};
use crate::save::{self, Array};
use crate::{model, open};

/// Images of one run of the model; more of them are run one after the other.
const BATCH: usize = 16;

/// Most bytes of a file with inputs.
const MAX_INPUT: usize = 4 << 30;

pub fn run(args: &ForwardArgs, verbose: bool) -> anyhow::Result<()> {
    if let Some(input) = &args.input {
        return images(args, input, verbose);
    }
    let text = model::text(&args.model)?.load(&Device::Cpu).map_err(|error| open::named(&args.model, error))?;
    save::check(&args.output, &[] as &[&Path])?;
    let texts = Texts::new(&text, &args.text)?;
    save::safetensors(&args.output, &texts.arrays(), &[])
}

/// What texts become.
struct Texts {
    count: usize,
    ids: Vec<i64>,
    rows: Vec<Vec<f32>>,
    embeddings: Vec<f32>,
}

impl Texts {
    fn new(model: &TextModel, texts: &[String]) -> anyhow::Result<Self> {
        let ids = model.tokenizer().encode(texts)?;
        let rows = model.embed_ids(&ids)?;
        let (ids, embeddings) = (ids.iter().flatten().map(|&id| id.into()).collect(), rows.concat());
        if let Some(at) = embeddings.iter().position(|v| !v.is_finite()) {
            bail!("the text tower answers {} at index {at}", embeddings[at]);
        }
        Ok(Self { count: texts.len(), ids, rows, embeddings })
    }

    fn arrays(&self) -> Vec<Array<'_>> {
        let shape = |values: usize| vec![self.count, values / self.count.max(1)];
        vec![
            Array { name: "input_ids", shape: shape(self.ids.len()), values: Values::I64(&self.ids) },
            Array::f32("text_embeds", shape(self.embeddings.len()), &self.embeddings),
        ]
    }
}

/// The tensor, and texts if there are any.
fn images(args: &ForwardArgs, input: &Path, verbose: bool) -> anyhow::Result<()> {
    let (name, x) = load(input, args.tensor.as_deref()).with_context(|| show(input))?;
    let once = x.dims().first() == Some(&1);
    let builder = open::builder(args.run).loading(open::loading(once));
    let predictor = open::predictor_for(&args.model, builder, verbose, |info| fit(info, x.dims()))?;
    let (pixels, batch) = pixels(&name, &x, &predictor).with_context(|| show(input))?;
    save::check(&args.output, &[input])?;
    let output = forward(&predictor, &pixels, batch).map_err(|e| open::named(&args.model, e))?;
    let shapes = predictor.shapes(batch);
    // without a head the model's answer is what the head would read, as in timm
    let (logits, answer) = match (shapes.logits, &output.logits) {
        (Some(shape), Some(values)) => (shape, values),
        _ => (shapes.pre_logits.clone(), &output.pre_logits),
    };
    let mut arrays = vec![
        Array::f32("features", shapes.features, &output.features),
        Array::f32("pre_logits", shapes.pre_logits, &output.pre_logits),
        Array::f32("logits", logits.clone(), answer),
    ];
    if predictor.info().projection {
        arrays.push(Array::f32("image_embeds", logits, answer));
    }
    let (texts, similarities);
    if !args.text.is_empty() {
        let text = predictor.text().map_err(|e| open::named(&args.model, e))?;
        texts = Texts::new(&text, &args.text)?;
        let images: Vec<Vec<f32>> = answer.chunks(answer.len() / batch).map(<[f32]>::to_vec).collect();
        similarities = text.logits(&images, &texts.rows)?.concat();
        arrays.extend(texts.arrays());
        arrays.push(Array::f32("logits_per_image", [batch, texts.count], &similarities));
    }
    save::safetensors(&args.output, &arrays, &[])
}

/// Any number of images, a bounded number at a time.
pub fn forward(predictor: &Predictor, pixels: &[f32], batch: usize) -> vit_model::Result<Output> {
    let image = pixels.len() / batch.max(1);
    let (mut all, mut part) = (Output::default(), Output::default());
    for pixels in pixels.chunks(BATCH * image.max(1)) {
        predictor.forward_into(pixels, pixels.len() / image.max(1), Wanted::All, &mut part)?;
        if let Some(logits) = &part.logits {
            all.logits.get_or_insert_default().extend_from_slice(logits);
        }
        all.features.extend_from_slice(&part.features);
        all.pre_logits.extend_from_slice(&part.pre_logits);
    }
    Ok(all)
}

/// The input tensor `[B, C, H, W]`, normalised, and B.
pub fn read_input(path: &Path, tensor: Option<&str>, predictor: &Predictor) -> anyhow::Result<(Vec<f32>, usize)> {
    load(path, tensor).and_then(|(name, x)| pixels(&name, &x, predictor)).with_context(|| show(path))
}

/// Where the file that a model was converted from left its image size open, the input decides between sizes of as many
/// patches: nothing else of the model depends on it.
fn fit(info: &mut ModelInfo, dims: &[usize]) {
    let &[_, _, h, w] = dims else { return };
    let ([ph, pw], patches) = (info.model.patch_size, info.model.num_patches());
    let open = info.source.assumed().iter().any(|said| said.starts_with("img_size"));
    if open && h % ph == 0 && w % pw == 0 && (h / ph).checked_mul(w / pw) == Some(patches) {
        info.model.img_size = [h, w];
        info.preprocess.input_size = [info.model.in_chans, h, w];
    }
}

/// The input tensor and its name.
fn load(path: &Path, tensor: Option<&str>) -> anyhow::Result<(String, Tensor)> {
    let bytes = inputs::read(path, MAX_INPUT)?;
    if bytes.len() > MAX_INPUT {
        bail!("at most {MAX_INPUT} bytes are read");
    }
    let file = BufferedSafetensors::new(bytes).context("not a safetensors file")?;
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
fn pixels(name: &str, x: &Tensor, predictor: &Predictor) -> anyhow::Result<(Vec<f32>, usize)> {
    let x = predictor.input(x).map_err(|error| match error {
        Error::Input(why) => anyhow::anyhow!("tensor `{}`: {why}", escape(name)),
        error => error.into(),
    })?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        bail!("tensor `{}`: {} at index {at}", escape(name), values[at]);
    }
    Ok((values, x.dim(0)?))
}
