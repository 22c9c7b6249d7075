//! Times a ViT in other Rust runtimes: `rust-peers RUNTIME FOLDER --batch N --threads N --iters N [--warmup N] [--input F]`,
//! or `rust-peers --versions`.
//!
//! FOLDER holds `model.onnx` and `model.safetensors` (timm's names), as bench/peers.py makes them. The last line on stdout is
//! the JSON object that `vit-cli bench --json` prints, with the `logits` of the first image. Every runtime is given what its
//! documentation recommends for speed: packed weights, a fixed batch where shapes are compiled, one thread per core.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// Inputs that take turns, so that no run finds its own in the cache.
const INPUTS: usize = 4;

struct Args {
    runtime: String,
    folder: PathBuf,
    batch: usize,
    threads: usize,
    iters: usize,
    warmup: usize,
    /// Little-endian f32 `[batch, 3, side, side]`; random where there is none.
    input: Option<PathBuf>,
}

/// As Cargo.toml pins them.
const VERSIONS: [(&str, &str); 3] = [("rten", "0.27.0"), ("tract", "0.23.9"), ("candle-transformers", "0.11.1")];

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("--versions") {
        VERSIONS.iter().for_each(|(name, version)| println!("{name} {version}"));
        return Ok(());
    }
    let args = arguments()?;
    let threads = args.threads.to_string();
    // SAFETY: nothing else runs yet
    unsafe {
        std::env::set_var("RAYON_NUM_THREADS", &threads);
        std::env::set_var("CANDLE_NUM_THREADS", &threads);
        std::env::set_var("RTEN_NUM_THREADS", &threads);
    }
    let start = Instant::now();
    let mut run = match args.runtime.as_str() {
        "rten" => rten(&args)?,
        "tract" => tract(&args)?,
        "candle-transformers" => candle(&args)?,
        other => bail!("{other}: choose rten, tract or candle-transformers"),
    };
    let load = start.elapsed();

    let inputs = inputs(&args)?;
    let (mut times, mut logits) = (Vec::new(), Vec::new());
    for (i, input) in inputs.iter().cycle().take(args.warmup + args.iters).enumerate() {
        let start = Instant::now();
        let answer = run(input)?;
        if i >= args.warmup {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        if i == 0 {
            logits = answer;
        }
    }
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    println!(
        "{}",
        serde_json::json!({
            "runtime": args.runtime, "batch": args.batch, "threads": args.threads, "precision": "f32",
            "load_ms": load.as_secs_f64() * 1e3, "median_ms": median, "images_per_s": args.batch as f64 * 1e3 / median,
            "times_ms": times, "logits": logits,
        })
    );
    Ok(())
}

fn arguments() -> Result<Args> {
    let mut words = std::env::args().skip(1);
    let mut next = |what: &str| words.next().with_context(|| format!("{what} is missing"));
    let (runtime, folder) = (next("RUNTIME")?, next("FOLDER")?.into());
    let mut args = Args { runtime, folder, batch: 1, threads: 1, iters: 5, warmup: 1, input: None };
    while let Ok(option) = next("") {
        let value = next(&option)?;
        match option.as_str() {
            "--batch" => args.batch = value.parse()?,
            "--threads" => args.threads = value.parse()?,
            "--iters" => args.iters = value.parse()?,
            "--warmup" => args.warmup = value.parse()?,
            "--input" => args.input = Some(value.into()),
            _ => bail!("{option} is no option"),
        }
    }
    Ok(args)
}

/// Side of the square images, from the `pretrained_cfg` that timm wrote.
fn side(folder: &Path) -> Result<usize> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let side = config["pretrained_cfg"]["input_size"][1].as_u64().context("config.json has no input_size")?;
    Ok(usize::try_from(side)?)
}

fn inputs(args: &Args) -> Result<Vec<Vec<f32>>> {
    if let Some(path) = &args.input {
        let bytes = std::fs::read(path)?;
        return Ok(vec![bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()]);
    }
    let side = side(&args.folder)?;
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    // of variance 1, as normalised pixels are
    let mut value = || (0..3).map(|_| uniform()).sum::<f32>();
    Ok((0..INPUTS).map(|_| (0..args.batch * 3 * side * side).map(|_| value()).collect()).collect())
}

type Run = Box<dyn FnMut(&[f32]) -> Result<Vec<f32>>>;

fn rten(args: &Args) -> Result<Run> {
    use rten::{ModelOptions, Value};
    use rten_tensor::NdTensor;
    use rten_tensor::prelude::*;

    let shape = [args.batch, 3, side(&args.folder)?, side(&args.folder)?];
    let mut options = ModelOptions::with_all_ops();
    // packing costs more than one run gains
    options.prepack_weights(args.warmup + args.iters > 1);
    let model = options.load_file(args.folder.join("model.onnx"))?;
    let run = move |pixels: &[f32]| -> Result<Vec<f32>> {
        let x = NdTensor::from_data(shape, pixels.to_vec());
        let answer: Value = model.run_one(x.view().into(), None)?;
        let logits: NdTensor<f32, 2> = answer.try_into().map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(logits.iter().copied().collect())
    };
    Ok(Box::new(run))
}

fn tract(args: &Args) -> Result<Run> {
    use tract_onnx::prelude::*;

    let threads = tract_linalg::multithread::Executor::multithread(args.threads);
    tract_linalg::multithread::set_default_executor(threads);
    let side = side(&args.folder)?;
    let shape = [args.batch, 3, side, side];
    let model = tract_onnx::onnx()
        .model_for_path(args.folder.join("model.onnx"))?
        .with_input_fact(0, f32::fact(shape).into())?
        .into_optimized()?
        .into_runnable()?;
    let run = move |pixels: &[f32]| -> Result<Vec<f32>> {
        let x = Tensor::from_shape(&shape, pixels)?;
        let answer = model.run(tvec!(x.into()))?;
        Ok(answer[0].to_plain_array_view::<f32>()?.iter().copied().collect())
    };
    Ok(Box::new(run))
}

fn candle(args: &Args) -> Result<Run> {
    use candle_core::{DType, Device, Tensor};
    use candle_nn::VarBuilder;
    use candle_transformers::models::vit;

    let side = side(&args.folder)?;
    let timm = candle_core::safetensors::load(args.folder.join("model.safetensors"), &Device::Cpu)?;
    // from timm's names to those that candle-transformers reads; it wants q, k and v apart
    let mut renamed = std::collections::HashMap::new();
    let parts = [
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ];
    let whole = [
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
        ("patch_embed.proj.bias", "vit.embeddings.patch_embeddings.projection.bias"),
        ("norm.weight", "vit.layernorm.weight"),
        ("norm.bias", "vit.layernorm.bias"),
        ("head.weight", "classifier.weight"),
        ("head.bias", "classifier.bias"),
    ];
    for (name, tensor) in timm {
        if let Some((_, new)) = whole.iter().find(|(old, _)| *old == name) {
            renamed.insert((*new).to_owned(), tensor);
            continue;
        }
        let mut words = name.splitn(3, '.');
        let (Some("blocks"), Some(i), Some(rest)) = (words.next(), words.next(), words.next()) else {
            bail!("{name}: candle-transformers' ViT has no such tensor");
        };
        let (module, kind) = rest.rsplit_once('.').context("a name without a dot")?;
        let layer = format!("vit.encoder.layer.{i}");
        if module == "attn.qkv" {
            for (part, tensor) in ["query", "key", "value"].into_iter().zip(tensor.chunk(3, 0)?) {
                renamed.insert(format!("{layer}.attention.attention.{part}.{kind}"), tensor.contiguous()?);
            }
        } else {
            let (_, new) = parts.iter().find(|(old, _)| *old == module).with_context(|| format!("{name}: unknown"))?;
            renamed.insert(format!("{layer}.{new}.{kind}"), tensor);
        }
    }
    let size = |name: &str, dim: usize| -> Result<usize> {
        Ok(renamed.get(name).with_context(|| format!("{name} is missing"))?.dim(dim)?)
    };
    let layers = (0..).take_while(|i| renamed.contains_key(&format!("vit.encoder.layer.{i}.output.dense.weight"))).count();
    let hidden = size("vit.layernorm.weight", 0)?;
    let config = vit::Config {
        hidden_size: hidden,
        num_hidden_layers: layers,
        num_attention_heads: hidden / 64,
        intermediate_size: size("vit.encoder.layer.0.output.dense.weight", 1)?,
        hidden_act: candle_nn::Activation::Gelu,
        layer_norm_eps: 1e-6,
        image_size: side,
        patch_size: size("vit.embeddings.patch_embeddings.projection.weight", 3)?,
        num_channels: 3,
        qkv_bias: true,
    };
    let classes = size("classifier.weight", 0)?;
    let model = vit::Model::new(&config, classes, VarBuilder::from_tensors(renamed, DType::F32, &Device::Cpu))?;
    let batch = args.batch;
    let run = move |pixels: &[f32]| -> Result<Vec<f32>> {
        let x = Tensor::from_slice(pixels, (batch, 3, side, side), &Device::Cpu)?;
        Ok(model.forward(&x)?.flatten_all()?.to_vec1()?)
    };
    Ok(Box::new(run))
}
