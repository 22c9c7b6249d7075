//! A checkpoint, opened and saved in another library's form.
use vit_model::{Checkpoint, checkpoint::Format};

fn main() -> vit_model::Result<()> {
    let folder = std::env::temp_dir().join(format!("vit-model-saved-{}", std::process::id()));
    let checkpoint = Checkpoint::open("weights/digits/model.safetensors")?;
    checkpoint.save(&folder, Format::Timm)?;
    println!("{} classes", Checkpoint::open(&folder)?.info.model.num_classes);
    std::fs::remove_dir_all(&folder).expect("the folder was just written");
    Ok(())
}
