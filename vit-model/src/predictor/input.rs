//! What a predictor answers for: an image in any of the forms that a program has it in.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use image::{DynamicImage, RgbImage};

use super::loaded::Loaded;
use crate::image::{Image, ImageOptions, Preprocess};
use crate::{Error, Result};

/// An image to answer for: a path, an encoded file in memory, an [`image::DynamicImage`], an [`image::RgbImage`], or an
/// [`Image`] of this crate (which is also how raw pixels come in, see [`Image::from_pixels`]).
///
/// Functions take `impl Into<Input>`, so there is no need to name this type. A `Result` is an input, too: an error comes
/// back as the answer for that input, so that an iterator which finds or fetches images can report its own failures in
/// order.
#[derive(Debug)]
pub struct Input<'a>(Form<'a>);

#[derive(Debug)]
enum Form<'a> {
    Path(Cow<'a, Path>),
    Bytes(Cow<'a, [u8]>),
    Image(Cow<'a, Image>),
    Dynamic(Cow<'a, DynamicImage>),
    Rgb(Cow<'a, RgbImage>),
    Failed(Error),
}

impl<'a> Input<'a> {
    /// The decoded image.
    ///
    /// # Errors
    /// [`Error::Image`] if the image cannot be read or decoded; the error that the input is.
    pub fn into_image(self, options: &ImageOptions) -> Result<Cow<'a, Image>> {
        match self.0 {
            Form::Path(path) => Image::open_with(path, options).map(Cow::Owned),
            Form::Bytes(bytes) => Image::decode_with(&bytes, options).map(Cow::Owned),
            Form::Image(image) => Ok(image),
            Form::Dynamic(image) => Image::from_dynamic(&image).map(Cow::Owned),
            Form::Rgb(image) => {
                let (width, height) = image.dimensions();
                Image::from_rgb8(width, height, image.into_owned().into_raw()).map(Cow::Owned)
            }
            Form::Failed(error) => Err(error),
        }
    }

    /// The file, if the input is one.
    fn path(&self) -> Option<PathBuf> {
        if let Form::Path(path) = &self.0 { Some(path.to_path_buf()) } else { None }
    }
}

impl Loaded {
    /// How images become the model's input.
    pub fn preprocess(&self) -> Result<&Preprocess> {
        self.preprocess.as_ref().map_err(Error::image)
    }

    /// An input as the model reads it, `[C, H, W]`.
    pub fn read_into(&self, input: Input<'_>, pixels: &mut [f32]) -> Result<()> {
        let path = input.path();
        let image = input.into_image(&self.image_options)?;
        let read = self.preprocess().and_then(|preprocess| preprocess.apply_into(&image, pixels));
        read.map_err(|error| if let Some(path) = path { error.within(&path) } else { error })
    }
}

macro_rules! inputs {
    ($form:ident: $($owned:ty => $borrowed:ty),* $(,)?) => {$(
        impl From<$owned> for Input<'_> {
            fn from(value: $owned) -> Self {
                Self(Form::$form(Cow::Owned(value.into())))
            }
        }

        impl<'a> From<&'a $borrowed> for Input<'a> {
            fn from(value: &'a $borrowed) -> Self {
                Self(Form::$form(Cow::Borrowed(value.as_ref())))
            }
        }

        impl<'a> From<&'a $owned> for Input<'a> {
            fn from(value: &'a $owned) -> Self {
                let value: &'a $borrowed = value;
                value.into()
            }
        }
    )*};
}

inputs!(Path: PathBuf => Path, String => str, OsString => OsStr);
inputs!(Bytes: Vec<u8> => [u8]);

macro_rules! images {
    ($($form:ident: $owned:ty),* $(,)?) => {$(
        impl From<$owned> for Input<'_> {
            fn from(value: $owned) -> Self {
                Self(Form::$form(Cow::Owned(value)))
            }
        }

        impl<'a> From<&'a $owned> for Input<'a> {
            fn from(value: &'a $owned) -> Self {
                Self(Form::$form(Cow::Borrowed(value)))
            }
        }
    )*};
}

images!(Image: Image, Dynamic: DynamicImage, Rgb: RgbImage);

impl<'a> From<&'a &str> for Input<'a> {
    fn from(path: &'a &str) -> Self {
        (*path).into()
    }
}

impl<'a> From<&'a &Path> for Input<'a> {
    fn from(path: &'a &Path) -> Self {
        (*path).into()
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Input<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a, T: Into<Input<'a>>> From<Result<T>> for Input<'a> {
    fn from(result: Result<T>) -> Self {
        result.map_or_else(|error| Self(Form::Failed(error)), Into::into)
    }
}
