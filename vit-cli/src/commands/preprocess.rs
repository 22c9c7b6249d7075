//! `preprocess`: an image as the model's input tensor, in a safetensors file.

use vit_model::image::Preprocess;

use crate::args::{PreprocessArgs, orientation};
use crate::sources::Source;
use crate::{model, save};

pub fn run(args: &PreprocessArgs) -> anyhow::Result<()> {
    let info = model::info(&args.model)?;
    let preprocess = Preprocess::new(&info.preprocess)?;
    let source = Source::of(&args.image);
    save::check(&args.output, &[&args.image])?;
    let image = source.image(orientation(args.no_exif))?;
    let pixels = source.named(preprocess.apply(&image))?;
    let [c, h, w] = info.preprocess.input_size;
    let tensor = save::Array::f32("pixel_values", [1, c, h, w], &pixels);
    save::safetensors(&args.output, &[tensor], &[])
}
