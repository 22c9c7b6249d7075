//! Exceptions, with the texts of the command line.

use std::ffi::OsStr;
use std::path::Path;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::{PyErr, create_exception};
use vit_model::Error as Cause;
use vit_model::printable::{escape, show};

create_exception!(vit_rs, Error, PyException, "What every exception of this module is.");
create_exception!(vit_rs, ImageError, Error, "An image cannot be read, decoded or preprocessed.");
create_exception!(vit_rs, InputError, Error, "An argument that does not fit the model.");
create_exception!(
    vit_rs,
    ModelError,
    Error,
    "A model cannot be found, read or converted, or answers values that are not finite."
);
create_exception!(vit_rs, HubError, Error, "The Hugging Face Hub, or the connection to it.");
create_exception!(vit_rs, UnsupportedError, Error, "What this build, this machine or this model cannot do.");

/// Adds the exceptions to the module.
pub fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("Error", py.get_type::<Error>())?;
    module.add("ImageError", py.get_type::<ImageError>())?;
    module.add("InputError", py.get_type::<InputError>())?;
    module.add("ModelError", py.get_type::<ModelError>())?;
    module.add("HubError", py.get_type::<HubError>())?;
    module.add("UnsupportedError", py.get_type::<UnsupportedError>())
}

/// The exception for an error that is about `model`. Its text is what `vit-cli` prints after `error: `, except that a device
/// is an argument here and not a flag.
pub fn of(model: &OsStr, error: Cause) -> PyErr {
    let mut text = error.to_string();
    if !matches!(error, Cause::Device { .. }) && !text.contains(&Path::new(model).display().to_string()) {
        text = format!("{}: {text}", show(model));
    }
    match error {
        Cause::Image { .. } => ImageError::new_err(text),
        Cause::Input(_) => InputError::new_err(text),
        Cause::Hub(_) => HubError::new_err(text),
        Cause::Unsupported { .. } | Cause::Device { .. } => UnsupportedError::new_err(text),
        _ => ModelError::new_err(text),
    }
}

/// The exception for an error of the converter.
pub fn of_conversion(error: &vit_convert::Error) -> PyErr {
    ModelError::new_err(error.to_string())
}

/// Why an image has no answer, as `vit-cli` writes it into a record: the image's name, then the reason.
pub fn record(name: Option<&Path>, error: &Cause) -> String {
    let why = error.to_string();
    let Some(name) = name.filter(|_| matches!(error, Cause::Image { .. })) else { return escape(&why) };
    let shown = show(name);
    if why.starts_with(&format!("{shown}: ")) {
        return escape(&why);
    }
    let why = why.strip_prefix(&format!("{}: ", name.display())).unwrap_or(&why);
    escape(&format!("{shown}: {why}"))
}
