//! The command line: every subcommand, its options and its examples.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

const ABOUT: &str =
    "Vision Transformers on the command line: classify, embed, explain, inspect and benchmark any ViT checkpoint.";

const MODEL_FORMS: &str = "\
A MODEL is any of
  digits                      the small model inside this program (handwritten digits)
  model.safetensors           a file that vit-convert wrote
  model.gguf                  one with weights in Q8_0 (vit-convert --dtype q8)
  folder/                     model.safetensors with a timm or Hugging Face config.json
  model.onnx                  an ONNX export of a ViT, converted in memory
  timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, google/vit-base-patch16-224@main
                              a Hugging Face repository, at a revision if you like
  vit-tiny, dinov2-small, …   a repository by its short name, see `vit-cli models`
A path that exists wins over the name `digits` and over a repository.

Answers go to stdout, everything else to stderr. Exit status: 0 all good, 1 some inputs failed or a comparison
did not hold, 2 usage or fatal, 130 interrupted.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "vit-cli", version, about = ABOUT, after_long_help = MODEL_FORMS, max_term_width = 110)]
pub struct Cli {
    /// Say on stderr which path ran and why
    #[arg(short, long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Predict(PredictArgs),
    Embed(EmbedArgs),
    Explain(ExplainArgs),
    Forward(ForwardArgs),
    Preprocess(PreprocessArgs),
    Summary(SummaryArgs),
    Inspect(InspectArgs),
    Compare(CompareArgs),
    Bench(BenchArgs),
    #[cfg(feature = "hub")]
    Models(ModelsArgs),
    #[cfg(feature = "hub")]
    Pull(PullArgs),
    Completions(CompletionsArgs),
}

/// Where and how precisely a model runs.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Running")]
pub struct RunArgs {
    /// Where to run; only `auto` falls back to the CPU, and it says so
    #[arg(long, value_enum, default_value_t, value_name = "DEVICE")]
    pub device: Device,
    /// CPU: f32, bf16x3 (f32-grade), bf16, int8 (AMX, VNNI); GPU: f32, f16, bf16; auto: the fastest that is f32-grade
    #[arg(long, value_enum, default_value_t, value_name = "PRECISION")]
    pub precision: Precision,
    /// Threads; default: the physical cores this process may use
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Run candle's modules on the CPU, not the CPU engine
    #[arg(long)]
    pub modules: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Device {
    #[default]
    Auto,
    Cpu,
    Cuda,
    Metal,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    #[default]
    Auto,
    F32,
    Bf16x3,
    Bf16,
    Int8,
    F16,
}

/// The images that a command reads.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// Images, folders of images (searched recursively), or `-` for one image on stdin
    #[arg(required = true, value_name = "FILES")]
    pub files: Vec<OsString>,
    /// Leave the picture as stored: do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
    /// Images per run of the model
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
}

impl ImageArgs {
    /// Whether there is one image, as far as the names say.
    pub fn single(&self) -> bool {
        matches!(&*self.files, [file] if !std::path::Path::new(file).is_dir())
    }
}

/// Names the classes of images
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli predict cat.jpg                                   with the model inside this program
  vit-cli predict --model flowers.safetensors photos/ --top 3
  vit-cli predict -m vit-base-patch16-224/ --format jsonl *.jpg
  curl -s https://example.org/cat.jpg | vit-cli predict -m model.onnx -
  vit-cli predict -m flowers.safetensors --format seed rose.jpg
A file whose name begins with a dash stands after `--`. An image that cannot be read gets an error record, the rest go on, and the
exit status is 1.")]
pub struct PredictArgs {
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    #[command(flatten)]
    pub images: ImageArgs,
    /// Classes per image
    #[arg(short = 'k', long = "top", visible_alias = "top-k", default_value_t = 5, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,
    /// text; json: one array; jsonl: a record a line; csv; seed: `class: NAME prob: P` for every class in class order
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: PredictFormat,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PredictFormat {
    #[default]
    Text,
    Json,
    Jsonl,
    Csv,
    Seed,
}

/// Turns images into feature vectors (what the head would read)
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli embed -m vit_small_patch14_dinov2/ photos/ --format jsonl > photos.jsonl
  vit-cli embed -m model.safetensors --normalize --format safetensors --output photos.safetensors photos/
The safetensors form holds `embeddings` [N, D] f32, and in its metadata `files`, a JSON list of the N names.")]
pub struct EmbedArgs {
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    #[command(flatten)]
    pub images: ImageArgs,
    /// json: one array; jsonl: a record a line; csv: file, then a column per feature; safetensors: needs --output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: EmbedFormat,
    /// Divide every vector by its length
    #[arg(long)]
    pub normalize: bool,
    /// The file to write; default: stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EmbedFormat {
    Json,
    #[default]
    Jsonl,
    Csv,
    Safetensors,
}

/// Shows where a model looks: attention as a picture
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli explain cat.jpg --output cat-attention.png -m vit-base-patch16-224/
  vit-cli explain cat.jpg --output block11.png -m model.safetensors --method map --block 11 --head 3
Rollout (arXiv 2005.00928) multiplies the attention of all blocks, each averaged over heads and mixed with the identity.
A map is one block's attention. Both show the class token's row, or the mean over all rows where there is none.")]
pub struct ExplainArgs {
    /// The image, or `-` for stdin
    #[arg(value_name = "IMAGE")]
    pub image: OsString,
    /// The PNG to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    /// rollout over all blocks, or one block's map
    #[arg(long, value_enum, default_value_t, value_name = "METHOD")]
    pub method: ExplainMethod,
    /// The block of a map; default: the last
    #[arg(long, value_name = "N")]
    pub block: Option<usize>,
    /// The head of a map; default: the mean over heads
    #[arg(long, value_name = "N")]
    pub head: Option<usize>,
    /// Write the bare map, without the picture beneath
    #[arg(long)]
    pub bare: bool,
    /// Leave the picture as stored: do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ExplainMethod {
    #[default]
    Rollout,
    Map,
}

/// Runs a tensor through a model: logits, features and pre_logits as safetensors
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  vit-cli forward model.safetensors --input x.safetensors --tensor x --output y.safetensors
The input is [B, C, H, W], normalised as the model expects; a u8 tensor (also [B, H, W, C]) is an image, and is normalised with the
model's own mean and standard deviation. The output holds, all f32, `logits` [B, classes] where the model has a head, `features` [B, N, D]
(timm's forward_features) and `pre_logits` (what the head reads).")]
pub struct ForwardArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL")]
    pub model: OsString,
    /// The safetensors file with the input
    #[arg(short, long, value_name = "FILE")]
    pub input: PathBuf,
    /// The name of the input tensor; default: `x`, or the only tensor of the file
    #[arg(short, long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Turns an image into a model's input tensor
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  vit-cli preprocess vit-base-patch16-224/ cat.jpg --output x.safetensors
Writes `pixel_values` [1, C, H, W] f32. A folder that holds configurations alone is enough.")]
pub struct PreprocessArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL")]
    pub model: OsString,
    /// The image, or `-` for stdin
    #[arg(value_name = "IMAGE")]
    pub image: OsString,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Leave the picture as stored: do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
}

/// Lists a model's modules, shapes and parameters
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli summary digits
  vit-cli summary model.safetensors --style torchsummary
  vit-cli summary vit_so400m_patch14_siglip_384       an architecture by timm's name, no weights needed")]
pub struct SummaryArgs {
    /// The model (see `vit-cli --help`), or timm's name of an architecture
    #[arg(value_name = "MODEL", default_value = "digits")]
    pub model: OsString,
    /// tree; torchsummary: the table that the Python package prints; json
    #[arg(short, long, value_enum, default_value_t, value_name = "STYLE")]
    pub style: SummaryStyle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SummaryStyle {
    #[default]
    Tree,
    Torchsummary,
    Json,
}

/// Shows what a model file holds: configuration, tensors, where it comes from, what was verified
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli inspect model.safetensors
  vit-cli inspect model.onnx          which nodes became which module, before you convert
  vit-cli inspect --json digits")]
pub struct InspectArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL", default_value = "digits")]
    pub model: OsString,
    /// One JSON document
    #[arg(long)]
    pub json: bool,
}

/// Compares two models on the same inputs
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli compare model.onnx model.safetensors
  vit-cli compare model.safetensors model-f16.safetensors --tolerance 1e-2
  vit-cli compare a.safetensors b.safetensors --input x.safetensors
Exit status 1 where a difference exceeds the tolerance.")]
pub struct CompareArgs {
    /// The first model (see `vit-cli --help`)
    #[arg(value_name = "A")]
    pub a: OsString,
    /// The second model
    #[arg(value_name = "B")]
    pub b: OsString,
    /// A safetensors file with the inputs; default: random ones
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// The name of the input tensor; default: `x`, or the only tensor of the file
    #[arg(short, long, value_name = "NAME", requires = "input")]
    pub tensor: Option<String>,
    /// Largest difference allowed, relative to the largest value (at least 1)
    #[arg(long, default_value_t = 1e-4, value_name = "T")]
    pub tolerance: f64,
    /// Random inputs
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), conflicts_with = "input")]
    pub inputs: u16,
    /// Where the random inputs start
    #[arg(long, default_value_t = 0, value_name = "N", conflicts_with = "input")]
    pub seed: u64,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Times a model
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli bench digits
  vit-cli bench model.safetensors --batch 8 --threads 2 --precision bf16 --json
  vit-cli bench model.safetensors --compare           every kernel and precision of this machine
Inputs are random and change from run to run. With --json the last line on stdout is one object: median_ms, times_ms,
images_per_s, precision, kernel, load_ms.")]
pub struct BenchArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL", default_value = "digits")]
    pub model: OsString,
    /// Images per run
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch: u16,
    /// Timed runs
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub iters: u32,
    /// Runs before those
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub warmup: u32,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
    /// Time every kernel and precision of this machine
    #[arg(long)]
    pub compare: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Lists checkpoints that have a short name, and what is in the cache
#[cfg(feature = "hub")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli models
  vit-cli pull dinov2-small
  vit-cli predict --model vit-tiny photo.jpg
Nothing is fetched here. A short name stands for a repository wherever a MODEL is asked for.")]
pub struct ModelsArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Fetches checkpoints from the Hub and says where they lie
#[cfg(feature = "hub")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli pull google/vit-base-patch16-224
  HF_HOME=/models vit-cli pull timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k@main
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.")]
pub struct PullArgs {
    /// Repository ids, at a revision if you like, or short names (see `vit-cli models`)
    #[arg(required = true, value_name = "REPOSITORY")]
    pub models: Vec<String>,
}

/// Prints a completion script for a shell
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  vit-cli completions bash > ~/.local/share/bash-completion/completions/vit-cli")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}
