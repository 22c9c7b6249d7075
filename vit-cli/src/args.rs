//! The command line: every subcommand, its options and its examples.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use vit_model::command_line::img_size;
use vit_model::image::Orientation;
use vit_model::{Device, Precision};

const ABOUT: &str =
    "Vision Transformers on the command line: classify, embed, explain, inspect and benchmark any ViT checkpoint.";

const MODEL_FORMS: &str = "\
A MODEL is any of
  digits                      the small built-in model (handwritten digits)
  model.safetensors           a file that vit-convert wrote
  model.gguf                  the same, with weights in Q8_0 (vit-convert --dtype q8)
  folder/                     weights with the config.json of timm or transformers, or with open_clip_config.json
  weights.pth                 weights beside their config.json: .safetensors, .pth, .pt, .bin, .ckpt; nothing in them runs
  state_dict.pth --arch vit_small_patch16_224
                              weights without a configuration; --arch is needed if several architectures have them
  model.onnx                  an ONNX export of a ViT, converted in memory
  timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, google/vit-base-patch16-224@main
                              a Hugging Face repository, optionally at a revision
  vit-tiny, dinov2-small, …   the short name of a repository (see `vit-cli models`)
A path that exists takes precedence over the name `digits` and over a repository.

Results go to stdout, everything else to stderr. Exit status: 0 success, 1 some inputs failed or a comparison
exceeded its tolerance, 2 usage error or fatal error, 130 interrupted.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "vit-cli", version, about = ABOUT, after_long_help = MODEL_FORMS, max_term_width = 110)]
pub struct Cli {
    /// Report on stderr which code ran and why
    #[arg(short, long, global = true)]
    pub verbose: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// What a model's files do not say, or say otherwise.
#[derive(Args, Debug)]
#[command(next_help_heading = "Opening a model")]
pub struct OpenArgs {
    /// The architecture of weights without a configuration, by timm's name
    #[arg(long, global = true, value_name = "NAME")]
    pub arch: Option<String>,
    /// Which network of a checkpoint to read, if it has several: `model_ema`, `teacher`, …
    #[arg(long, global = true, value_name = "KEY")]
    pub state_dict: Option<String>,
    /// Images of another size than the model's own: 384, or HEIGHTxWIDTH; position embeddings are resampled
    #[arg(long, global = true, value_name = "SIZE", value_parser = img_size)]
    pub img_size: Option<[usize; 2]>,
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
    Similar(SimilarArgs),
    Eval(EvalArgs),
    Compare(CompareArgs),
    Bench(BenchArgs),
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
    #[cfg(feature = "hub")]
    Models(ModelsArgs),
    #[cfg(feature = "hub")]
    Pull(PullArgs),
    Doctor(DoctorArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Where and how precisely a model runs.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Running")]
pub struct RunArgs {
    /// Where to run; `auto` uses a GPU if this build supports one and one is present, and the CPU otherwise
    #[arg(long, default_value = "auto", value_name = "DEVICE", value_parser = device())]
    pub device: Device,
    /// CPU: f32, bf16x3 (as exact as f32), bf16, int8 (AMX, VNNI); GPU: f32, f16, bf16; auto: the fastest as exact as f32
    #[arg(long, default_value = "auto", value_name = "PRECISION", value_parser = precision())]
    pub precision: Precision,
    /// Number of threads; default: the physical cores this process may use
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Run candle's modules on the CPU instead of the CPU engine
    #[arg(long)]
    pub modules: bool,
}

fn device() -> impl TypedValueParser<Value = Device> {
    PossibleValuesParser::new(["auto", "cpu", "cuda", "metal"]).try_map(|name| name.parse())
}

fn precision() -> impl TypedValueParser<Value = Precision> {
    PossibleValuesParser::new(["auto", "f32", "bf16x3", "bf16", "int8", "f16"]).try_map(|name| name.parse())
}

/// The images that a command reads.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// Images, folders of images (searched recursively), or `-` for one image on stdin
    #[arg(required = true, value_name = "FILES")]
    pub files: Vec<OsString>,
    /// Do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
    /// Images per run of the model
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
}

impl ImageArgs {
    /// The orientation in which images are read.
    pub fn orientation(&self) -> Orientation {
        orientation(self.no_exif)
    }

    /// Whether the arguments name exactly one image, rather than several or a folder.
    pub fn single(&self) -> bool {
        matches!(&*self.files, [file] if !std::path::Path::new(file).is_dir())
    }
}

/// The orientation that the flag `--no-exif` selects.
pub fn orientation(no_exif: bool) -> Orientation {
    if no_exif { Orientation::Stored } else { Orientation::Exif }
}

/// Classifies images
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli predict digit.png                                 with the built-in model
  vit-cli predict --model flowers.safetensors photos/ --top 3
  vit-cli predict -m vit-base-patch16-224/ --format jsonl *.jpg
  curl -s https://example.org/cat.jpg | vit-cli predict -m model.onnx -
  vit-cli predict -m flowers.safetensors --format seed rose.jpg
  vit-cli predict -m clip-base32 --labels 'cat,dog,sports car' --template 'a photo of a {}' *.jpg
Put file names that begin with a dash after `--`. An image that cannot be read gets an error record; the others are still
classified, and the exit status is 1.")]
pub struct PredictArgs {
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    #[command(flatten)]
    pub images: ImageArgs,
    #[command(flatten)]
    pub words: WordArgs,
    /// Classes per image
    #[arg(short = 'k', long = "top", visible_alias = "top-k", default_value_t = 5, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,
    /// text; json: one array; jsonl: one record per line; csv; seed: `class: NAME prob: P` for every class in class order
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: PredictFormat,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Classes that are words, for models with a text tower.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Zero-shot (CLIP, SigLIP)")]
pub struct WordArgs {
    /// The classes, in words, for a model with a text tower
    #[arg(long, value_name = "LABEL,…", value_delimiter = ',', conflicts_with = "labels_file")]
    pub labels: Vec<String>,
    /// A file with the classes: one a line, or JSON
    #[arg(long, value_name = "FILE")]
    pub labels_file: Option<PathBuf>,
    /// What an image of a class is called, with {} for the label; if given more than once, embeddings are averaged
    #[arg(long = "template", value_name = "TEXT")]
    pub templates: Vec<String>,
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

/// Turns images into feature vectors (the input of the model's head), or texts into vectors of the same space
#[derive(Args, Debug)]
#[command(mut_arg("files", |files| files.required(false).required_unless_present("text")), after_help = "\
Examples:
  vit-cli embed -m vit_small_patch14_dinov2/ photos/ --format jsonl > photos.jsonl
  vit-cli embed -m model.safetensors --normalize --format safetensors --output photos.safetensors photos/
  vit-cli embed -m clip-base32 --text 'a photo of a cat' --text 'a photo of a dog'
A model with two towers (CLIP, SigLIP) embeds images and texts into one space.
The safetensors file contains `embeddings` [N, D] f32; its metadata entry `files` is a JSON list of the N names.")]
pub struct EmbedArgs {
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    #[command(flatten)]
    pub images: ImageArgs,
    /// A text to embed instead of images, for a model with a text tower; can be given more than once
    #[arg(long, value_name = "TEXT", conflicts_with = "files")]
    pub text: Vec<String>,
    /// Which vector of an image: `embedding` is projected into the space of texts if the model has two towers, `pooled` is not
    #[arg(long, value_enum, default_value_t, value_name = "LAYER", conflicts_with = "text")]
    pub layer: Layer,
    /// json: one array; jsonl: one record per line; csv: file, then a column per feature; safetensors: needs --output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: EmbedFormat,
    /// Scale every vector to unit length (L2)
    #[arg(long)]
    pub normalize: bool,
    /// The file to write; default: stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Layer {
    #[default]
    Embedding,
    Pooled,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EmbedFormat {
    Json,
    #[default]
    Jsonl,
    Csv,
    Safetensors,
}

/// Draws a model's attention over an image
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli explain cat.jpg --output cat-attention.png -m vit-base-patch16-224/
  vit-cli explain cat.jpg --output block11.png -m model.safetensors --method map --block 11 --head 3
Rollout (arXiv 2005.00928) multiplies the attention of all blocks, each averaged over heads and mixed with the identity.
A map is one block's attention. Both show the class token's row, or the mean over all rows if there is no class token.")]
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
    /// Rollout over all blocks, or the attention map of one block
    #[arg(long, value_enum, default_value_t, value_name = "METHOD")]
    pub method: ExplainMethod,
    /// The block to map, from 0; default: the last
    #[arg(long, value_name = "N")]
    pub block: Option<usize>,
    /// The head to map, from 0; default: the mean over heads
    #[arg(long, value_name = "N")]
    pub head: Option<usize>,
    /// Write only the map, without the image underneath
    #[arg(long)]
    pub bare: bool,
    /// Do not apply the EXIF orientation
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

/// Runs a tensor or texts through a model: logits, features and embeddings as safetensors
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  vit-cli forward model.safetensors --input x.safetensors --tensor x --output y.safetensors
A float input is [B, C, H, W], normalised as the model expects. A u8 input, [B, C, H, W] or [B, H, W, C], contains pixels,
which are normalised with the model's own mean and standard deviation. The output contains f32 tensors: `logits`
[B, classes] if the model has a head, `features` [B, N, D] (timm's forward_features) and `pre_logits` (the head's input);
`image_embeds` if the head is the projection of a two-tower model. Texts give `input_ids` (i64) and `text_embeds`, and with an
input `logits_per_image` [B, texts]. Embeddings are not normalised.")]
pub struct ForwardArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL")]
    pub model: OsString,
    /// The safetensors file with the input
    #[arg(short, long, value_name = "FILE", required_unless_present = "text")]
    pub input: Option<PathBuf>,
    /// The name of the input tensor; default: `x`, or the only tensor in the file
    #[arg(short, long, value_name = "NAME", requires = "input")]
    pub tensor: Option<String>,
    /// A text for the model's text tower; can be given more than once
    #[arg(long, value_name = "TEXT")]
    pub text: Vec<String>,
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
Writes `pixel_values` [1, C, H, W] as f32. A folder that contains only configuration files is enough.")]
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
    /// Do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
}

/// Lists a model's modules, shapes and parameters
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli summary digits
  vit-cli summary model.safetensors --style torchsummary
  vit-cli summary vit_so400m_patch14_siglip_384       an architecture by its timm name, no weights needed")]
pub struct SummaryArgs {
    /// The model (see `vit-cli --help`), or the timm name of an architecture
    #[arg(value_name = "MODEL", default_value = "digits")]
    pub model: OsString,
    /// tree; torchsummary: the table that Python's torchsummary prints; json
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

/// Shows what a model file contains: configuration, tensors, origin and verification
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
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Finds the images of an index that are most similar to an image or a text
#[derive(Args, Debug)]
#[command(
    allow_missing_positional = true,
    after_help = "\
Examples:
  vit-cli embed photos/ -m dinov2-small -o photos.safetensors --format safetensors
  vit-cli similar cat.jpg photos.safetensors
  vit-cli similar --text 'a red car' photos.safetensors       if the index is of a two-tower model (CLIP, SigLIP)
  vit-cli similar --duplicates photos.safetensors --threshold 0.97
The similarity is the cosine of two embeddings. The search is exact: it reads the whole index once, and needs no memory for it.
The model is the one that made the index, unless --model names another."
)]
pub struct SimilarArgs {
    /// The image to compare with, or `-` for stdin
    #[arg(value_name = "QUERY", required_unless_present_any = ["text", "duplicates"])]
    pub query: Option<OsString>,
    /// A file that `embed --format safetensors` wrote
    #[arg(value_name = "INDEX", required = true)]
    pub index: PathBuf,
    /// A text to compare with, instead of an image
    #[arg(long, value_name = "TEXT", conflicts_with = "query")]
    pub text: Option<String>,
    /// List the pairs of the index that are at least as similar as --threshold
    #[arg(long, conflicts_with_all = ["query", "text", "model"])]
    pub duplicates: bool,
    /// The model that made the index; default: what the index names
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<OsString>,
    /// How many to list
    #[arg(short = 'k', long = "top", visible_alias = "top-k", default_value_t = 10, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top: u32,
    /// Leave out what is less similar, from -1 to 1; default: nothing, and 0.95 for --duplicates
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true, value_parser = cosine)]
    pub threshold: Option<f32>,
    /// text; json: one array; jsonl: one record per line; csv
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub format: SimilarFormat,
    /// Write a contact sheet of what was found, one HTML file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SimilarFormat {
    #[default]
    Text,
    Json,
    Jsonl,
    Csv,
}

fn cosine(text: &str) -> Result<f32, String> {
    let expected = || "expected a number from -1 to 1".to_owned();
    let value: f32 = text.parse().map_err(|_| expected())?;
    if (-1.0..=1.0).contains(&value) { Ok(value) } else { Err(expected()) }
}

/// Measures a model on images whose class is known
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli eval photos/ -m flowers.safetensors                 photos/daisy/*.jpg, photos/rose/*.jpg, …
  vit-cli eval labels.csv -m flowers.safetensors -o report/   columns file and label; tables, pictures and a contact sheet
  vit-cli eval photos/ -m flowers.safetensors --compare-precision int8
  vit-cli eval photos/ -m clip-base32 --template 'a photo of a {}'
A folder or a label belongs to the class of that name, whatever its case, or to the class of that number. If none has a name
that the model knows and there are as many as classes, they are numbered in sorted order, as torchvision's ImageFolder does.
Precision, recall and F1 are scikit-learn's; the calibration error is over 15 bins (arXiv 1706.04599); two models are compared
by McNemar's exact test.")]
pub struct EvalArgs {
    /// A folder with a folder for each class, or a CSV file with the columns `file` and `label`
    #[arg(value_name = "SOURCE")]
    pub source: PathBuf,
    /// The model (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: OsString,
    #[command(flatten)]
    pub words: WordArgs,
    /// A second model, to be compared on the same images
    #[arg(long, value_name = "MODEL")]
    pub compare: Option<OsString>,
    /// The precision of what is compared: the second model, or the same one again
    #[arg(long, value_name = "PRECISION", value_parser = precision())]
    pub compare_precision: Option<Precision>,
    /// The folder for results.json, classes.csv, confusion_matrix.{csv,png}, reliability.png and mistakes.{csv,html}
    #[arg(short, long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
    /// How many of the worst mistakes to keep
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub mistakes: u32,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Do not apply the EXIF orientation
    #[arg(long)]
    pub no_exif: bool,
    /// Images per run of the model
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Compares two models on the same inputs
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli compare model.onnx model.safetensors
  vit-cli compare model.safetensors model-f16.safetensors --tolerance 1e-2
  vit-cli compare a.safetensors b.safetensors --input x.safetensors
The exit status is 1 if a difference exceeds the tolerance.")]
pub struct CompareArgs {
    /// The first model (see `vit-cli --help`)
    #[arg(value_name = "A")]
    pub a: OsString,
    /// The second model
    #[arg(value_name = "B")]
    pub b: OsString,
    /// A safetensors file with the inputs; default: random inputs
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// The name of the input tensor; default: `x`, or the only tensor in the file
    #[arg(short, long, value_name = "NAME", requires = "input")]
    pub tensor: Option<String>,
    /// Largest difference allowed, relative to the largest value (at least 1)
    #[arg(long, default_value_t = 1e-4, value_name = "T")]
    pub tolerance: f64,
    /// Number of random inputs
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), conflicts_with = "input")]
    pub inputs: u16,
    /// The seed of the random inputs
    #[arg(long, default_value_t = 0, value_name = "N", conflicts_with = "input")]
    pub seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Measures how fast a model runs
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli bench digits
  vit-cli bench model.safetensors --batch 8 --threads 2 --precision bf16 --json
  vit-cli bench model.safetensors --compare           every kernel and precision that this machine supports
Inputs are random and change from run to run. With --json the last line of stdout is one object: median_ms, times_ms,
images_per_s, precision, kernel, load_ms.")]
pub struct BenchArgs {
    /// The model (see `vit-cli --help`)
    #[arg(value_name = "MODEL", default_value = "digits")]
    pub model: OsString,
    /// Images per run
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch: u16,
    /// Number of timed runs
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub iters: u32,
    /// Number of untimed runs before the timed ones
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub warmup: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Time every kernel and precision that this machine supports
    #[arg(long)]
    pub compare: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Answers over HTTP: for curl, a browser, and OpenAI, Hugging Face and KServe clients
#[cfg(feature = "serve")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli serve -m flowers.safetensors                     then open http://127.0.0.1:8000
  curl -F image=@rose.jpg 'http://127.0.0.1:8000/predict?top_k=3'
  vit-cli serve -m flowers=flowers.safetensors -m dino=dinov2-small --port 80 --hostname 0.0.0.0
The first model answers requests that name none. /docs describes the routes, /metrics is for Prometheus. SIGTERM lets
requests finish.")]
pub struct ServeArgs {
    /// A model, or NAME=MODEL; repeat it to serve several (see `vit-cli --help`)
    #[arg(short, long, default_value = "digits", env = "VIT_MODEL", value_name = "MODEL")]
    pub model: Vec<OsString>,
    /// Address to listen on; 0.0.0.0 is every network of this machine
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub hostname: std::net::IpAddr,
    /// Port to listen on; 0 chooses a free one
    #[arg(long, default_value_t = 8000, env = "VIT_PORT")]
    pub port: u16,
    /// Requests that are answered at once; more get 429
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub max_concurrent_requests: u16,
    /// Images per run of the model
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_batch: u16,
    /// Images in one request
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub max_client_batch_size: u16,
    /// Bytes of a request's body
    #[arg(long, default_value_t = 32_000_000, value_name = "BYTES", value_parser = payload())]
    pub payload_limit: usize,
    /// Ask clients for this key (`Authorization: Bearer KEY`)
    #[arg(long, env = "VIT_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Let pages of this origin ask (`*`: any)
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Option<String>,
    /// Fetch pictures that requests name by URL; never from private addresses
    #[arg(long)]
    pub allow_url: bool,
    /// Seconds that requests may take to finish after SIGTERM
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub grace: u16,
    /// Log each request to stderr as a line of JSON
    #[arg(long)]
    pub json_logs: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[cfg(feature = "serve")]
fn payload() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u32).range(1024..).try_map(usize::try_from)
}

/// Lists the checkpoints that have a short name, and what the cache contains
#[cfg(feature = "hub")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli models
  vit-cli pull dinov2-small
  vit-cli predict --model vit-tiny photo.jpg
This command downloads nothing. A short name works wherever a command takes a MODEL.")]
pub struct ModelsArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Downloads checkpoints from the Hub and prints their folders
#[cfg(feature = "hub")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vit-cli pull google/vit-base-patch16-224
  HF_HOME=/models vit-cli pull timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k@main
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.")]
pub struct PullArgs {
    /// Repository ids, optionally at a revision, or short names (see `vit-cli models`)
    #[arg(required = true, value_name = "REPOSITORY")]
    pub models: Vec<String>,
}

/// Says what this build and this machine have, and what would make models faster
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Do not ask the Hub
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
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

/// Writes the manual pages, for packagers
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  vit-cli man target/man")]
pub struct ManArgs {
    /// The folder to write to; it gets vit-cli.1 and a page for each command
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}
