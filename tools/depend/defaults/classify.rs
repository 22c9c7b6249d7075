//! The program of the README.
use vit_model::Predictor;

fn main() -> vit_model::Result<()> {
    let model = Predictor::open("digits")?; // or a file, a folder, `timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k`
    for best in model.classify("weights/digits/samples/3.png", 3)? {
        println!("{:>6.2} %  {}", 100.0 * best.probability, best.label);
    }
    let files = ["weights/digits/samples/3.png", "weights/digits/samples/8.png"];
    let vectors = model.embed_all(files).normalize().collect::<vit_model::Result<Vec<_>>>()?;
    println!("{} vectors of {} values", vectors.len(), vectors[0].len());
    Ok(())
}
