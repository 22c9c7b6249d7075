//! Images: from files, memory and pixels to 8-bit RGB (`decode`, `gif`, `jpeg`, `tags`, `pixels`), found in folders (`folder`), and turned into a
//! model's input (`preprocess`, `resample`).

mod decode;
mod folder;
mod gif;
mod jpeg;
mod pixels;
mod preprocess;
mod resample;
mod tags;

pub use decode::{Image, ImageOptions, Orientation};
pub use folder::{Files, files};
pub use preprocess::Preprocess;
