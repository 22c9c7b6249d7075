//! One model shared by eight threads.
use vit_model::{Device, Precision, Predictor};

fn main() -> vit_model::Result<()> {
    let model = Predictor::builder().device(Device::Cpu).precision(Precision::F32).threads(2).open("digits")?;
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8)
            .map(|digit| {
                let model = &model;
                scope.spawn(move || model.classify(format!("weights/digits/samples/{digit}.png").as_str(), 1))
            })
            .collect();
        for answer in asked {
            print!("{} ", answer.join().expect("no thread panics")?[0].label);
        }
        println!();
        Ok(())
    })
}
