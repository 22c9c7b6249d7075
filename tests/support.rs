//! Running the programs, reading and writing what they read and write, the guide's tables, and random numbers from a seed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value};
use vit_convert::Converted;
pub use vit_model::random::SplitMix64 as Random;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `docs/src/<page>` holds this text between the markers of `tests/<name>.rs`; with `VIT_BLESS` in the environment it is put there.
pub fn guide_block(page: &str, name: &str, text: &str) {
    let (begin, end) = (format!("<!-- {name}: written by tests/{name}.rs -->\n"), format!("<!-- /{name} -->"));
    let path = root().join("docs/src").join(page);
    let guide = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = guide.split_once(&begin).expect("the page has the block's first marker");
    let (old, after) = rest.split_once(&end).expect("the page has the block's last marker");
    if std::env::var_os("VIT_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{begin}{text}{end}{after}")).unwrap();
        return;
    }
    assert!(old == text, "run with VIT_BLESS=1; the fixtures say\n{text}");
}

/// vit-cli, without what the caller's environment would change.
pub fn vit_cli() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_vit-cli")))
}

fn clean(mut command: Command) -> Command {
    for name in ["VIT_MODEL", "VIT_CPU", "HF_TOKEN", "HF_ENDPOINT", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command.env("HF_HUB_OFFLINE", "1").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Runs `vit-cli ARGS` to its end.
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Done {
    finish(vit_cli().args(args))
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Done {
    Done::from(command.output().expect("the program starts"))
}

/// How a program ended.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Done {
    /// Exit status 0; what it printed.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// That exit status, one short message on stderr which holds all of `parts`, no panic.
    #[track_caller]
    pub fn bad(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(!self.stderr.contains("panicked") && self.stderr.len() < 4096, "{self:?}");
        for part in parts {
            assert!(self.stderr.contains(part), "`{part}` in {self:?}");
        }
        self
    }
}

/// A tensor of a safetensors file, widened to f32.
#[derive(Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// All tensors of a file.
pub fn read_safetensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let widen = |view: &safetensors::tensor::TensorView<'_>| match view.dtype() {
        safetensors::Dtype::F32 => {
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        safetensors::Dtype::U8 => view.data().iter().map(|&b| f32::from(b)).collect(),
        other => panic!("{other:?}"),
    };
    let tensors = file.iter();
    tensors.map(|(name, v)| (name.to_owned(), Tensor { shape: v.shape().to_vec(), values: widen(&v) })).collect()
}

/// A file of one f32 or u8 tensor.
pub fn write_safetensors(path: &Path, name: &str, dtype: safetensors::Dtype, shape: &[usize], bytes: &[u8]) {
    let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).expect("bytes fit the shape");
    std::fs::write(path, safetensors::serialize([(name, view)], None).expect("serialises")).expect("writes");
}

/// A file of ours taken apart, to be put together otherwise.
#[derive(Clone)]
pub struct Parts {
    pub header: Map<String, Value>,
    /// What the header's metadata hold as text.
    pub document: Value,
    pub data: Vec<u8>,
}

impl Parts {
    pub fn of(bytes: &[u8]) -> Self {
        let (length, rest) = bytes.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let header: Map<String, Value> = serde_json::from_slice(header).unwrap();
        let document = serde_json::from_str(header["__metadata__"]["config"].as_str().unwrap()).unwrap();
        Self { header, document, data: data.to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = self.header.clone();
        header["__metadata__"]["config"] = self.document.to_string().into();
        let mut header = serde_json::to_vec(&header).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        [&(header.len() as u64).to_le_bytes(), header.as_slice(), &self.data].concat()
    }

    pub fn names(&self) -> Vec<String> {
        self.header.keys().filter(|name| *name != "__metadata__").cloned().collect()
    }

    /// Where a tensor's bytes are.
    pub fn range(&self, name: &str) -> Range<usize> {
        let at = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        at(0)..at(1)
    }

    /// As a file that was made on purpose.
    pub fn without_checksums(&mut self) {
        self.document.as_object_mut().unwrap().remove("xxh3").expect("checksums");
    }
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `max |a − b|`; infinite where one is NaN or the lengths differ.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}

/// Writes a conversion as `vit-convert` does.
pub fn write_to(output: &Path, converted: &Converted) -> vit_convert::Result<()> {
    converted.save(output, vit_model::Format::Safetensors).map(drop)
}

/// Options that prove nothing.
pub fn unproven() -> vit_convert::Options {
    vit_convert::Options::new().verify(vit_convert::Verify::Skip)
}
