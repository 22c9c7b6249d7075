//! `preprocess`: an image as the model's input tensor, in a safetensors file.

use std::path::Path;

use vit_model::preprocess::Preprocess;

use crate::args::PreprocessArgs;
use crate::images::Source;
use crate::{model, predict, save};

pub fn run(args: &PreprocessArgs) -> anyhow::Result<()> {
    let info = model::info(&args.model)?;
    let preprocess = Preprocess::new(&info.preprocess)?;
    let source = if args.image == "-" { Source::Stdin } else { Source::File(args.image.clone().into()) };
    let image = predict::read_image(&source, !args.no_exif)?;
    let pixels = predict::named(&source, preprocess.apply(&image))?;
    let [c, h, w] = info.preprocess.input_size;
    let tensor = save::F32 { name: "pixel_values", shape: vec![1, c, h, w], values: &pixels };
    save::safetensors(&args.output, &[Path::new(&args.image)], &[tensor], &[])
}
