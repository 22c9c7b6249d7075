//! Images: from files, memory and pixels to 8-bit RGB (`decode`, `pixels`), found in folders (`folder`), and turned into a
//! model's input (`preprocess`, `resample`).

mod decode;
mod folder;
mod jpeg;
mod pixels;
mod preprocess;
mod resample;

pub use decode::{Image, ImageOptions, Orientation};
pub use folder::{Files, files};
pub use preprocess::Preprocess;
