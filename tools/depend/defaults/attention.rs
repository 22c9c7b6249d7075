//! Attention of the last block as values, from an image that is already in memory.
use vit_model::{Predictor, image::Image};

fn main() -> vit_model::Result<()> {
    let model = Predictor::open("digits")?;
    let image = Image::open("weights/digits/samples/8.png")?;
    let maps = model.attention(&image)?;
    let last = maps.last().expect("the digits model has four blocks");
    let [heads, n, _] = last.shape();
    println!("{}: {heads} heads over {n} tokens", last.name());
    println!("rollout over {:?} patches: {} values", maps.grid(), maps.rollout()?.len());
    Ok(())
}
