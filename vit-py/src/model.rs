//! The class `Model`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use numpy::{IntoPyArray, PyArray2, PyArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use vit_model::image::Orientation;
use vit_model::resolve::Location;
use vit_model::{Error as Cause, Predictor};

use crate::images::{Held, View};
use crate::{errors, images, table};

/// How often a long call looks for Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(100);

/// One class of an answer.
#[pyclass(frozen, get_all, module = "vit_rs")]
#[derive(Clone)]
pub struct Prediction {
    /// The class's name, or its number if the model has no names.
    label: String,
    /// The number of the class.
    index: usize,
    /// The probability, between 0 and 1.
    probability: f32,
}

#[pymethods]
impl Prediction {
    fn __repr__(&self) -> String {
        format!("Prediction(label={:?}, index={}, probability={})", self.label, self.index, self.probability)
    }
}

/// A model that answers for images.
///
/// Args:
///     model: a safetensors or GGUF file, a folder of timm or transformers, an ONNX file, "digits", a short name, or a
///         repository on the Hugging Face Hub, such as "timm/vit_small_patch14_dinov2.lvd142m".
///     precision: "auto" (the fastest that is as exact as f32), "f32", "bf16x3", "bf16" or "int8"; "f16" on a GPU.
///     threads: CPU threads for the model and for reading images; by default the physical cores of this process.
///     device: "auto", "cpu", "cuda", "cuda:1" or "metal".
///     exif: whether files are turned upright as their EXIF orientation says.
///
/// Several threads may use one model, and the interpreter is free while it computes. A model pickles as its name and its
/// options, and is opened again where it is unpickled. Answers have the same bits as vit-cli's, whatever the batch.
#[pyclass(frozen, module = "vit_rs")]
pub struct Model {
    predictor: Predictor,
    name: OsString,
    options: Options,
}

struct Options {
    precision: String,
    threads: Option<usize>,
    device: String,
    exif: bool,
}

/// What becomes of an image that cannot be read.
fn returns_errors(errors: &str) -> PyResult<bool> {
    match errors {
        "raise" => Ok(false),
        "return" => Ok(true),
        _ => Err(PyValueError::new_err(format!("errors is \"raise\" or \"return\", found {errors:?}"))),
    }
}

/// Threads do not survive a fork, so a child could wait forever for those of its parent.
fn check_fork() -> PyResult<()> {
    static OPENED: OnceLock<u32> = OnceLock::new();
    let here = std::process::id();
    if *OPENED.get_or_init(|| here) == here {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "this process was forked after its parent opened a model, whose threads it does not have; start it with \
         multiprocessing.get_context(\"spawn\"), or open models only in the children",
    ))
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (model, *, precision = "auto", threads = None, device = "auto", exif = true))]
    fn new(
        py: Python<'_>,
        model: PathBuf,
        precision: &str,
        threads: Option<usize>,
        device: &str,
        exif: bool,
    ) -> PyResult<Self> {
        check_fork()?;
        if threads == Some(0) {
            return Err(PyValueError::new_err("threads is at least 1"));
        }
        // a worker that unpickles the model may run in another folder
        let name = match std::path::absolute(&model) {
            Ok(path) if model.exists() => path.into_os_string(),
            _ => model.clone().into_os_string(),
        };
        let given = model.as_os_str();
        let fail = |error| errors::of(given, error);
        let mut builder = Predictor::builder()
            .precision(precision.parse().map_err(fail)?)
            .device(device.parse().map_err(fail)?)
            .orientation(if exif { Orientation::Exif } else { Orientation::Stored });
        if let Some(threads) = threads {
            builder = builder.threads(threads);
        }
        let predictor = py.detach(|| {
            let checkpoint = match Location::of(given).map_err(fail)? {
                Location::Onnx(path) => vit_convert::open(path).map_err(|error| errors::of_conversion(&error))?,
                found => found.open().map_err(fail)?,
            };
            builder.checkpoint(&checkpoint).map_err(fail)
        })?;
        let (precision, device) = (precision.to_owned(), device.to_owned());
        Ok(Self { predictor, name, options: Options { precision, threads, device, exif } })
    }

    /// Turns images into vectors.
    ///
    /// Args:
    ///     images: a list of paths, encoded files (bytes), PIL images, or arrays [H, W, 3] of uint8; or an array [N, H, W, 3].
    ///     normalize: whether to divide each vector by its length, so that a product of two is their cosine similarity.
    ///     batch: how many images the model runs at once. Answers do not depend on it.
    ///     errors: "raise" raises ImageError for the first image that cannot be read. "return" gives such an image a row of
    ///         NaN, and returns the pair (vectors, errors), with None or a text for each image.
    ///
    /// Returns:
    ///     An array [N, D] of float32.
    #[pyo3(signature = (images, *, normalize = false, batch = 8, errors = "raise"))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        images: &Bound<'py, PyAny>,
        normalize: bool,
        batch: usize,
        errors: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let returns = returns_errors(errors)?;
        let held = images::all(images)?;
        let views = held.iter().map(Held::view).collect::<PyResult<Vec<_>>>()?;
        let answers = self.embed_views(py, &views, normalize, batch)?;
        let width = self.dim();
        let mut vectors = Vec::with_capacity(answers.len() * width);
        let mut texts = Vec::with_capacity(answers.len());
        for (answer, view) in answers.into_iter().zip(&views) {
            match answer {
                Ok(vector) => {
                    vectors.extend_from_slice(&vector);
                    texts.push(None);
                }
                Err(error) if returns => {
                    vectors.resize(vectors.len() + width, f32::NAN);
                    texts.push(Some(errors::record(view.name(), &error)));
                }
                Err(error) => return Err(errors::ImageError::new_err(errors::record(view.name(), &error))),
            }
        }
        let vectors: Bound<'_, PyArray2<f32>> = vectors.into_pyarray(py).reshape([texts.len(), width])?;
        if returns { Ok((vectors, texts).into_pyobject(py)?.into_any()) } else { Ok(vectors.into_any()) }
    }

    /// Classifies images.
    ///
    /// Args:
    ///     images: as for embed.
    ///     k: how many classes, the most probable first.
    ///     batch: how many images the model runs at once.
    ///     errors: "raise", or "return" to give an image that cannot be read its ImageError in place of a list.
    ///
    /// Returns:
    ///     A list of Prediction for each image.
    #[pyo3(signature = (images, k = 5, *, batch = 8, errors = "raise"))]
    fn classify<'py>(
        &self,
        py: Python<'py>,
        images: &Bound<'py, PyAny>,
        k: usize,
        batch: usize,
        errors: &str,
    ) -> PyResult<Vec<Py<PyAny>>> {
        check_fork()?;
        let returns = returns_errors(errors)?;
        let held = images::all(images)?;
        let views = held.iter().map(Held::view).collect::<PyResult<Vec<_>>>()?;
        let all = py.detach(|| self.predictor.classify_all(views.iter().copied(), k).batch(batch));
        let answers = self.drain(py, all, views.len())?;
        let mut out = Vec::with_capacity(answers.len());
        for (answer, view) in answers.into_iter().zip(&views) {
            match answer {
                Ok(classes) => {
                    let classes: Vec<_> = (classes.into_iter())
                        .map(|p| Prediction { label: p.label, index: p.class, probability: p.probability })
                        .collect();
                    out.push(classes.into_pyobject(py)?.into_any().unbind());
                }
                Err(error) => {
                    let error = errors::ImageError::new_err(errors::record(view.name(), &error));
                    if !returns {
                        return Err(error);
                    }
                    out.push(error.into_value(py).into_any());
                }
            }
        }
        Ok(out)
    }

    /// Shows what the model looks at: how much the answer takes from each patch of an image.
    ///
    /// Args:
    ///     image: a path, bytes, a PIL image or an array.
    ///     block: the block whose attention is returned; by default the rollout over all blocks (arXiv 2005.00928).
    ///     head: one head of that block; by default the mean over its heads.
    ///
    /// Returns:
    ///     An array [rows, columns] of float32, a value for each patch.
    #[pyo3(signature = (image, *, block = None, head = None))]
    fn attention<'py>(
        &self,
        py: Python<'py>,
        image: &Bound<'py, PyAny>,
        block: Option<usize>,
        head: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        check_fork()?;
        if head.is_some() && block.is_none() {
            return Err(PyValueError::new_err("head needs a block"));
        }
        let held = Held::of(image)?;
        let view = held.view()?;
        let maps = py.detach(|| {
            let maps = self.predictor.attention(view)?;
            let tokens = match block {
                Some(block) => maps.block(block, head)?,
                None => maps.rollout()?,
            };
            Ok((maps.grid(), maps.per_patch(&tokens)?))
        });
        let (grid, values) = maps.map_err(|error| match error {
            Cause::Image { .. } => errors::ImageError::new_err(errors::record(view.name(), &error)),
            error => errors::of(&self.name, error),
        })?;
        values.into_pyarray(py).reshape(grid)
    }

    /// Adds the columns `embedding` and `error` to a batch of Arrow.
    ///
    /// Args:
    ///     batch: any object with the Arrow C data interface (__arrow_c_array__ or __arrow_c_stream__): a RecordBatch or a
    ///         Table of pyarrow, a data frame of Polars, a relation of DuckDB, …
    ///     column: the column of images: paths (strings), encoded files (binary), or structs {bytes, path}, as Hugging Face
    ///         datasets have them.
    ///     normalize, model_batch: as normalize and batch of embed.
    ///
    /// Returns:
    ///     The batch with `embedding`, a fixed-size list of D float32, and `error`, a string. An image that cannot be read
    ///     has a vector of NaN and an error, and `error` is null for the others. pyarrow's types come back as pyarrow's types, and others as an object with the same interface.
    #[pyo3(signature = (batch, column = "image", *, normalize = false, model_batch = 8))]
    fn embed_arrow<'py>(
        &self,
        batch: &Bound<'py, PyAny>,
        column: &str,
        normalize: bool,
        model_batch: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        table::embed(batch, column, self.dim(), |views| self.embed_views(batch.py(), views, normalize, model_batch))
    }

    /// The number of values of a vector.
    #[getter]
    fn dim(&self) -> usize {
        self.predictor.embedding_len()
    }

    /// The names of the classes, or None.
    #[getter]
    fn labels(&self) -> Option<Vec<String>> {
        self.predictor.labels().map(<[String]>::to_vec)
    }

    /// The document of the model: its architecture, its preprocessing, and where it comes from.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let text = serde_json::to_string(self.predictor.info()).map_err(|e| PyValueError::new_err(e.to_string()))?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// What runs the model, for example "AMX".
    #[getter]
    fn kernel(&self) -> String {
        self.predictor.backend().kernel.to_string()
    }

    /// The precision that runs, for example "bf16x3".
    #[getter]
    fn precision(&self) -> String {
        self.predictor.backend().precision.to_string()
    }

    /// The CPU threads of the model.
    #[getter]
    fn threads(&self) -> usize {
        self.predictor.backend().threads
    }

    fn __repr__(&self) -> String {
        let backend = self.predictor.backend();
        let name = Path::new(&self.name).display();
        format!("<vit_rs.Model {name}: {} on {}, {} threads>", backend.precision, backend.kernel, backend.threads)
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let keywords = PyDict::new(py);
        keywords.set_item("precision", &self.options.precision)?;
        keywords.set_item("threads", self.options.threads)?;
        keywords.set_item("device", &self.options.device)?;
        keywords.set_item("exif", self.options.exif)?;
        Ok((PyTuple::new(py, [&self.name])?, keywords))
    }
}

impl Model {
    /// The vector of each image, or why it has none.
    fn embed_views(
        &self,
        py: Python<'_>,
        views: &[View<'_>],
        normalize: bool,
        batch: usize,
    ) -> PyResult<Vec<Result<Vec<f32>, Cause>>> {
        check_fork()?;
        let all = py.detach(|| {
            let all = self.predictor.embed_all(views.iter().copied()).batch(batch);
            if normalize { all.normalize() } else { all }
        });
        self.drain(py, all, views.len())
    }

    /// Takes every answer while the interpreter is free, and looks for Ctrl-C now and then. An error that is not of one image
    /// ends the call.
    fn drain<T: Send>(
        &self,
        py: Python<'_>,
        mut all: impl Iterator<Item = Result<T, Cause>> + Send,
        expected: usize,
    ) -> PyResult<Vec<Result<T, Cause>>> {
        let mut answers = Vec::with_capacity(expected);
        loop {
            let done = py.detach(|| {
                let start = Instant::now();
                while start.elapsed() < PATIENCE {
                    match all.next() {
                        Some(Err(error)) if !matches!(error, Cause::Image { .. } | Cause::Output(_)) => {
                            return Err(error);
                        }
                        Some(answer) => answers.push(answer),
                        None => return Ok(true),
                    }
                }
                Ok(false)
            });
            if done.map_err(|error| errors::of(&self.name, error))? {
                return Ok(answers);
            }
            py.check_signals()?;
        }
    }
}
