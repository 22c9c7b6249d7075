//! One model in every container that people bring, and models under the names of other repositories: each gives PyTorch's answer.

use std::fs;
use std::path::{Path, PathBuf};

use vit_model::candle::{DType, Device, Tensor, safetensors};
use vit_model::{Checkpoint, Format, checkpoint::OpenOptions};

use crate::support::{root, run};

/// f32 on both sides, sums in another order.
const TOLERANCE: f32 = 2e-5;

fn fixtures() -> PathBuf {
    root().join("tests/fixtures/containers")
}

fn expected(name: &str) -> Tensor {
    let path = fixtures().join("expect.safetensors");
    safetensors::load(path, &Device::Cpu).unwrap().remove(name).unwrap()
}

/// The model's answer: logits, or what the head would read.
fn answer(checkpoint: &Checkpoint) -> Tensor {
    let model = checkpoint.model(DType::F32, &Device::Cpu).unwrap();
    model.forward(&expected("x")).unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

fn agrees(path: &Path, name: &str) -> Checkpoint {
    let checkpoint = Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"));
    let far = far(&answer(&checkpoint), &expected(name));
    assert!(far < TOLERANCE, "{}: {far}", path.display());
    checkpoint
}

#[test]
fn every_container_gives_the_same_answer() {
    let mut seen = 0;
    for entry in fs::read_dir(fixtures().join("plain")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().unwrap() == "json" {
            continue;
        }
        let checkpoint = agrees(&path, "plain");
        // which of several networks it is, is said
        let assumed = checkpoint.info.source.assumed().join(" ");
        match path.file_stem().unwrap().to_str().unwrap() {
            "ema" => assert!(assumed.contains("`model_ema`") && assumed.contains("`model`"), "{assumed}"),
            "dino" => assert!(assumed.contains("`teacher`") && assumed.contains("`student`"), "{assumed}"),
            _ => assert_eq!(assumed, ""),
        }
        seen += 1;
    }
    assert_eq!(seen, 16);
}

#[test]
fn other_names_and_eight_bits_and_lora_give_pytorchs_answer() {
    for (path, name) in [
        ("fp8/model.safetensors", "fp8"),
        ("fp8/fp8.pth", "fp8"),
        ("dinov2/dinov2_vits14_reg4_pretrain.pth", "dinov2"),
        ("dinov2/teacher_checkpoint.pth", "dinov2"),
        ("open_clip", "open_clip"),
        ("openai/clip.pt", "openai"),
        ("lora", "lora"),
    ] {
        agrees(&fixtures().join(path), name);
    }
}

#[test]
fn a_prefix_is_taken_off_and_said() {
    let remarks = |name: &str| Checkpoint::open(fixtures().join("plain").join(name)).unwrap().remarks().join("; ");
    assert!(remarks("compiled.pth").contains("`_orig_mod.module.` was taken off"));
    assert!(remarks("trained.pth.tar").contains("under the key `state_dict`"));
    assert!(
        remarks("dino.pth").contains("`dino_head.mlp.0.weight` only matter in training"),
        "{}",
        remarks("dino.pth")
    );
    assert!(Checkpoint::open(fixtures().join("plain/state.pth")).unwrap().remarks().is_empty());
    let done = run([
        "-v",
        "forward",
        "--precision",
        "f32",
        fixtures().join("plain/compiled.pth").to_str().unwrap(),
        "--input",
        fixtures().join("expect.safetensors").to_str().unwrap(),
        "--output",
        tempfile::tempdir().unwrap().path().join("y.safetensors").to_str().unwrap(),
    ]);
    assert!(done.stderr.contains("the prefix `_orig_mod.module.` was taken off"), "{}", done.stderr);
}

#[test]
fn the_user_chooses_between_networks() {
    let path = fixtures().join("plain/dino.pth");
    let student = OpenOptions::new().state_dict("student").open(&path).unwrap();
    assert!(far(&answer(&student), &expected("plain")) > 0.1);
    assert!(student.info.source.assumed().is_empty());
    let said = OpenOptions::new().state_dict("nobody").open(&path).unwrap_err().to_string();
    assert!(said.contains("`student`, `teacher`"), "{said}");
}

#[test]
fn weights_alone_are_named_or_found_by_their_shapes() {
    let folder = tempfile::tempdir().unwrap();
    // the fixture's sizes are no name's, so nothing is guessed, and a name that does not fit is refused
    let path = folder.path().join("state.pth");
    fs::copy(fixtures().join("plain/state.pth"), &path).unwrap();
    let said = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(said.contains("--arch") && said.contains("state.pth"), "{said}");
    let said = OpenOptions::new().arch("vit_tiny_patch16_224").open(&path).unwrap_err().to_string();
    assert!(said.contains("the shape"), "{said}");
    let said = OpenOptions::new().arch("vit_tiny_patch16_22").open(&path).unwrap_err().to_string();
    assert!(said.contains("did you mean vit_tiny_patch16_224"), "{said}");
    // a file in a folder of its own is found by what fits
    fs::copy(fixtures().join("plain/config.json"), folder.path().join("config.json")).unwrap();
    fs::copy(fixtures().join("expect.safetensors"), folder.path().join("expect.safetensors")).unwrap();
    agrees(folder.path(), "plain");
    fs::copy(fixtures().join("plain/ema.pth"), folder.path().join("ema.pth")).unwrap();
    let said = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(said.contains("name one of ema.pth, state.pth"), "{said}");
}

#[test]
fn a_full_size_state_dict_has_one_name_or_several() {
    use vit_model::names::Architecture;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    for (name, found) in [("test_vit", Some("test_vit")), ("vit_tiny_patch16_384", Some("vit_tiny_patch16"))] {
        let mut config = Architecture::of(name).unwrap().config;
        config.num_classes = 7;
        let tensors = vit_model::layers::parameters(&config).unwrap();
        let tensors = tensors
            .iter()
            .map(|(name, shape)| (name.clone(), Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu).unwrap()));
        safetensors::save(&tensors.collect::<std::collections::HashMap<_, _>>(), &path).unwrap();
        let opened = Checkpoint::open(&path);
        match found {
            Some(found) => {
                let checkpoint = opened.unwrap();
                assert!(
                    checkpoint.info.source.architecture().unwrap().starts_with(found),
                    "{:?}",
                    checkpoint.info.source
                );
                assert_eq!((checkpoint.config().num_classes, checkpoint.config().img_size), (7, config.img_size));
                assert!(checkpoint.info.source.assumed().iter().any(|said| said.starts_with("architecture: ")));
            }
            None => assert!(opened.unwrap_err().to_string().contains("--arch")),
        }
        let named = OpenOptions::new().arch(name).open(&path).unwrap();
        assert_eq!(named.config(), &config);
    }
}

#[test]
fn an_adapter_alone_is_called_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixtures().join("lora/adapter_config.json"), folder.path().join("adapter_config.json")).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), "").unwrap();
    let said = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(said.contains("PEFT adapter") && said.contains("merge_and_unload"), "{said}");
    // without the file that says how it is scaled, LoRA beside the weights is not merged
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "pytorch_model.bin"] {
        fs::copy(fixtures().join("lora").join(file), folder.path().join(file)).unwrap();
    }
    let said = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(said.contains("no adapter_config.json") && said.contains("merge_and_unload"), "{said}");
}

#[test]
fn a_pytorch_checkpoint_is_written_as_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.safetensors");
    Checkpoint::open(fixtures().join("plain/ema.pth")).unwrap().save(&out, Format::Safetensors).unwrap();
    let written = agrees(&out, "plain");
    assert!(written.info.source.assumed().join(" ").contains("`model_ema`"));
}

#[test]
fn a_pickle_that_is_a_program_is_refused_and_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let canary = folder.path().join("canary");
    let command = format!("touch {}", canary.display());
    let text = [b"X", &u32::try_from(command.len()).unwrap().to_le_bytes()[..], command.as_bytes()].concat();
    let program = [b"\x80\x02cposix\nsystem\n", text.as_slice(), b"\x85R."].concat();
    fs::copy(fixtures().join("plain/config.json"), folder.path().join("config.json")).unwrap();
    let path = folder.path().join("pytorch_model.bin");
    fs::write(&path, program).unwrap();
    for model in [folder.path(), &path] {
        let done = run(["inspect", model.to_str().unwrap()]);
        assert_eq!(done.code, Some(2));
        assert!(
            done.stderr.contains("`posix.system`") && done.stderr.contains("Nothing of it was run"),
            "{}",
            done.stderr
        );
    }
    assert!(!canary.exists());
}

#[test]
fn a_projection_is_called_image_embeds() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("y.safetensors");
    let done = run([
        "forward",
        fixtures().join("open_clip").to_str().unwrap(),
        "--precision",
        "f32",
        "--input",
        fixtures().join("expect.safetensors").to_str().unwrap(),
        "--output",
        out.to_str().unwrap(),
    ]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let written = safetensors::load(&out, &Device::Cpu).unwrap();
    assert!(far(&written["image_embeds"], &expected("open_clip")) < TOLERANCE);
}
