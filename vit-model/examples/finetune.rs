//! Training with candle: a Vision Transformer learns handwritten digits from nothing, and is tested on images that it has
//! never seen. It fails below 95 %.
//!
//! ```console
//! $ cargo run --release -p vit-model --example finetune
//! $ cargo run --release -p vit-model --example classify target/finetuned.safetensors
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW, VarBuilder, VarMap, loss};
use vit_model::{
    Checkpoint, Config, Format, ModelInfo, VisionTransformer, checkpoint,
    image::{Image, Preprocess},
    vit::finetune,
};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/digits");
const OUTPUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/finetuned.safetensors");
const EPOCHS: usize = 40;
const BATCH: usize = 32;
const LEARNING_RATE: f64 = 2e-3;
const WEIGHT_DECAY: f64 = 0.05;
/// Each block's share of the learning rate of the next; near 1, as all weights are new. 0.75 suits pretrained ones.
const LAYER_DECAY: f64 = 0.95;

fn main() -> anyhow::Result<()> {
    // the architecture of the digits model, its preprocessing and labels, with larger patches, which train faster
    let digits = checkpoint::info(format!("{DIGITS}/model.safetensors").as_ref())?;
    let mut info = ModelInfo::new(digits.model, digits.preprocess).with_labels(digits.labels);
    info.model.patch_size = [8, 8];
    let preprocess = Preprocess::new(&info.preprocess)?;
    let (images, labels) = data(format!("{DIGITS}/train.safetensors").as_ref(), 16, &preprocess)?;
    let (unseen, answers) = data(format!("{DIGITS}/heldout.safetensors").as_ref(), 255, &preprocess)?;

    let map = VarMap::new();
    let model = VisionTransformer::new(&info.model, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))?;
    let mut optimisers = optimisers(&map, &info.model)?;

    let (count, start) = (images.dim(0)?, Instant::now());
    let steps = (EPOCHS * count.div_ceil(BATCH)) as f64;
    let (mut step, mut seed) = (0.0, 1);
    for epoch in 1..=EPOCHS {
        let mut total = 0.0;
        for batch in shuffled(count, &mut seed).chunks(BATCH) {
            let chosen = Tensor::new(batch, &Device::Cpu)?;
            let logits = model.forward(&shift(&images.index_select(&chosen, 0)?, &mut seed)?)?; // [B, 10]
            let loss = loss::cross_entropy(&logits, &labels.index_select(&chosen, 0)?)?;
            total += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;

            // the rate rises over the first tenth, then falls as a cosine
            let done: f64 = step / steps;
            let rate = LEARNING_RATE * (10.0 * done).min(1.0) * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0;
            let gradients = loss.backward()?;
            for (optimiser, scale) in &mut optimisers {
                optimiser.set_learning_rate(rate * *scale);
                optimiser.step(&gradients)?;
            }
            step += 1.0;
        }
        println!("epoch {epoch:2}   loss {:.4}   {:3.0} s", total / count as f64, start.elapsed().as_secs_f64());
    }

    let found = model.forward(&unseen)?.argmax(D::Minus1)?;
    let right = found.eq(&answers)?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
    println!("{:.1} % of {} unseen images are right", 100.0 * right, unseen.dim(0)?);
    ensure!(right > 0.95, "expected more than 95 %");
    Path::new(OUTPUT).parent().map_or(Ok(()), std::fs::create_dir_all)?;
    Checkpoint::from_var_map(info, &map)?.save(OUTPUT, Format::Safetensors)?;
    println!("{OUTPUT}");
    Ok(())
}

/// Images `[N, C, H, W]` as the model reads them, and their labels `[N]`, of a file with grey levels from 0 to `white`.
fn data(path: &Path, white: u32, preprocess: &Preprocess) -> anyhow::Result<(Tensor, Tensor)> {
    let file = candle_core::safetensors::load(path, &Device::Cpu)?;
    let tensor = |name| file.get(name).with_context(|| format!("{}: no `{name}`", path.display()));
    let (n, h, w) = tensor("images")?.dims3()?;
    let grey: Vec<u8> = tensor("images")?.flatten_all()?.to_vec1()?;
    let rgb = |v: &u8| [((u32::from(*v) * 255 + white / 2) / white) as u8; 3];
    let mut pixels = Vec::new();
    for image in grey.chunks(h * w) {
        let image = Image::from_rgb8(w as u32, h as u32, image.iter().flat_map(rgb).collect())?;
        pixels.extend(preprocess.apply(&image)?); // [C, H, W]
    }
    let [channels, rows, columns] = preprocess.output_shape();
    let images = Tensor::from_vec(pixels, (n, channels, rows, columns), &Device::Cpu)?;
    Ok((images, tensor("labels")?.to_dtype(DType::U32)?))
}

/// An optimiser for each group of parameters, and its share of the learning rate: deep layers learn faster than shallow
/// ones, and weight decay leaves biases, norms, tokens and position embeddings alone.
fn optimisers(map: &VarMap, config: &Config) -> anyhow::Result<Vec<(AdamW, f64)>> {
    let layers = finetune::layer_groups(config)?;
    let mut groups: BTreeMap<(usize, bool), Vec<_>> = BTreeMap::new();
    for (name, var) in map.data().lock().expect("no thread has panicked").iter() {
        let key = (layers[name], finetune::no_weight_decay(name, var.dims()));
        groups.entry(key).or_default().push(var.clone());
    }
    let optimiser = |((layer, keep), vars)| {
        let weight_decay = if keep { 0.0 } else { WEIGHT_DECAY };
        let adam = AdamW::new(vars, ParamsAdamW { weight_decay, ..ParamsAdamW::default() })?;
        Ok((adam, LAYER_DECAY.powi((config.depth + 1 - layer) as i32)))
    };
    groups.into_iter().map(optimiser).collect()
}

/// Images `[B, C, H, W]`, moved by up to two pixels each way: what is learnt must not depend on the place.
fn shift(images: &Tensor, seed: &mut u64) -> candle_core::Result<Tensor> {
    let (_, _, h, w) = images.dims4()?;
    let wide = images.pad_with_same(2, 2, 2)?.pad_with_same(3, 2, 2)?;
    wide.narrow(2, random(5, seed), h)?.narrow(3, random(5, seed), w)?.contiguous()
}

/// 0 to `count` in another order at every call, the same in every run.
fn shuffled(count: usize, seed: &mut u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    for i in (1..count).rev() {
        order.swap(i, random(i + 1, seed));
    }
    order
}

/// A number below `limit`, from a linear congruential generator.
fn random(limit: usize, seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize % limit
}
