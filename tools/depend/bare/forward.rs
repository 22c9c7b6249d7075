//! Tensors in and out, with neither images nor the Hub.
use vit_model::Predictor;
use vit_model::candle::{DType, Device, Tensor};

fn main() -> vit_model::Result<()> {
    let model = Predictor::open("weights/digits/model.safetensors")?;
    let images = Tensor::zeros((2, 3, 32, 32), DType::F32, &Device::Cpu)?;
    println!("{:?}", model.forward(&images)?.shape());
    Ok(())
}
