//! The program vit-convert: what it writes where, and that the same input gives the same bytes.

#[cfg(unix)]
mod disk;

use std::path::{Path, PathBuf};
use std::process::Command;

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/zoo").join(case).join("model.onnx")
}

fn vit_convert() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vit-convert"))
}

/// Exit status and stderr.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let done = command.output().expect("the program starts");
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn a_folder_is_written_for_timm_or_transformers_and_not_replaced_unasked() {
    let onnx = fixture("timm-base-l17-dynimg");
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("a/b/");
    let convert = |output: &Path, more: &[&str]| run(vit_convert().arg(&onnx).arg(output).args(more));
    assert_eq!(convert(&folder, &["--img-size", "32x48"]), (Some(0), String::new()));
    let info = vit_model::checkpoint::open(&folder).unwrap().info;
    assert_eq!(info.preprocess.input_size[1..], [32, 48]);
    let (code, said) = convert(&folder, &[]);
    assert!(code == Some(2) && said.contains("--force"), "{said}");
    assert_eq!(convert(&folder, &["--force"]).0, Some(0));
    let hf = out.path().join("hf/");
    assert_eq!(convert(&hf, &["--to", "hf"]), (Some(0), String::new()));
    for name in ["model.safetensors", "config.json", "preprocessor_config.json"] {
        assert!(hf.join(name).is_file(), "{name}");
    }
    assert_eq!(std::fs::read_dir(&hf).unwrap().count(), 3);
    let file = out.path().join("c.safetensors");
    let (code, said) = convert(&file, &["--to", "hf"]);
    assert!(code == Some(2) && said.contains("folder"), "{said}");
    for bad in ["huge", "0", "32x", "64x64"] {
        let (code, said) = convert(&file, &["--img-size", bad]);
        assert!(code == Some(2) && !said.contains("panicked"), "{bad}: {said}");
    }
    assert!(!file.exists());
}

#[test]
fn a_dry_run_writes_the_report_and_nothing_else() {
    let out = tempfile::tempdir().unwrap();
    let (report, file) = (out.path().join("r.json"), out.path().join("m.safetensors"));
    let mut command = vit_convert();
    command.arg(fixture("timm-base-d18-fused")).arg(&file).arg("--dry-run").arg("--report").arg(&report);
    assert_eq!(run(&mut command).0, Some(0));
    assert!(!file.exists());
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let found = &report["found"];
    assert_eq!(found["tensors"]["blocks.0.attn.qkv.weight"]["by"], serde_json::json!(["transposed"]));
    let evidence = found["evidence"].as_array().unwrap();
    assert!(evidence.iter().any(|e| e["what"].as_str().unwrap().starts_with("num_heads")), "{evidence:?}");
    assert!(found["modules"].as_array().unwrap().iter().any(|m| m["name"] == "blocks.0.attn"));
    assert!(report["config"]["verified"]["max_rel"].as_f64().unwrap() < 1e-5);
}

#[test]
fn without_the_proof_the_file_says_so() {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("m.safetensors");
    assert_eq!(run(vit_convert().arg(fixture("timm-base-d18-fused")).arg(&file).arg("--no-verify")).0, Some(0));
    assert_eq!(vit_model::checkpoint::open(&file).unwrap().info.verified, Some(vit_model::Verification::skipped()));
}

/// A checkpoint as the input: the same model in another form.
#[test]
fn a_checkpoint_is_written_in_another_form() {
    let out = tempfile::tempdir().unwrap();
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
    let convert = |input: &Path, output: &str, more: &[&str]| {
        let output = out.path().join(output);
        let done = vit_convert().arg(input).arg(&output).args(more).output().expect("the program starts");
        (done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned(), output)
    };
    let values = |path: &Path, name: &str| vit_model::checkpoint::open(path).unwrap().weights.read_f32(name).unwrap();
    for case in ["timm/vit_base_patch16_siglip_224", "hf/dinov2_cls"] {
        let folder = parity.join(case);
        let (code, said, file) = convert(&folder, "m.safetensors", &[]);
        assert_eq!(code, Some(0), "{said}");
        let (before, after) =
            (vit_model::checkpoint::open(&folder).unwrap(), vit_model::checkpoint::open(&file).unwrap());
        assert_eq!(before.info, after.info, "{case}");
        for name in before.weights.tensors().keys() {
            assert_eq!(before.weights.read_f32(name).unwrap(), after.weights.read_f32(name).unwrap(), "{case}: {name}");
        }
        let (code, said, halves) = convert(&file, "h.safetensors", &["--dtype", "f16"]);
        assert_eq!(code, Some(0), "{said}");
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() / 1024.0 + 1e-7;
        assert!(values(&file, "pos_embed").iter().zip(&values(&halves, "pos_embed")).all(near));
        let (code, said, _) = convert(&file, "timm/", &["--force"]);
        assert!(code == Some(0) || said.contains("timm has no"), "{said}");
        // what it would overwrite
        let (code, said, _) = convert(&file, "m.safetensors", &[]);
        assert!(code == Some(2) && said.contains("is the input"), "{said}");
    }
    let (code, said, _) = convert(&parity.join("hf/vit_cls"), "v.safetensors", &["--img-size", "32"]);
    assert!(code == Some(2) && said.contains("are for ONNX files"), "{said}");
    let copy = out.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(parity.join("timm/test_vit4").join(name), copy.join(name)).unwrap();
    }
    for output in ["copy/", "copy/model.safetensors", "copy/../copy/new.safetensors"] {
        let (code, said, _) = convert(&copy, output, &["--force"]);
        assert!(code == Some(2) && said.contains("in the folder that is read"), "{output}: {said}");
    }
    // torchvision's heads are not in its file
    let tv = parity.join("torchvision/plain/model.safetensors");
    let (code, said, _) = convert(&tv, "tv.safetensors", &[]);
    assert!(code == Some(2) && said.contains("--num-heads"), "{said}");
    let (code, said, _) = convert(&tv, "tv.safetensors", &["--num-heads", "3"]);
    assert_eq!(code, Some(0), "{said}");
    let model = vit_model::checkpoint::open(&out.path().join("tv.safetensors")).unwrap().info.model;
    assert_eq!((model.num_heads, model.depth, model.num_classes, model.img_size), (3, 2, 5, [8, 8]));
    let (code, said, _) = convert(&fixture("timm-base-d18-fused"), "x.safetensors", &["--num-heads", "3"]);
    assert!(code == Some(2) && said.contains("a graph says its heads"), "{said}");
}

#[test]
fn q8_is_a_gguf_file_and_says_what_it_costs() {
    let out = tempfile::tempdir().unwrap();
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/digits/model.onnx");
    let convert = |output: &str, more: &[&str]| {
        let output = out.path().join(output);
        let done = vit_convert().arg(&digits).arg(&output).args(["--dtype", "q8"]).args(more).output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned(), output)
    };
    let (code, said, gguf) = convert("m.gguf", &[]);
    assert!(code == Some(0) && said.contains("q8: 4 inputs") && said.contains("4 of 4"), "{said}");
    let checkpoint = vit_model::checkpoint::open(&gguf).unwrap();
    let moved = checkpoint.info.verified.as_ref().unwrap();
    assert!(moved.q8_0().unwrap().max_rel < 0.02 && moved.q8_0_top1() == Some((4, 4)), "{moved:?}");
    assert!(checkpoint.weights.is_q8_0("head.weight") && !checkpoint.weights.is_q8_0("patch_embed.proj.weight"));
    let (code, _, unproven) = convert("n.gguf", &["--no-verify"]);
    assert_eq!(
        (code, vit_model::checkpoint::open(&unproven).unwrap().info.verified),
        (Some(0), Some(vit_model::Verification::skipped()))
    );
    for bad in ["m.safetensors", "folder/"] {
        let (code, said, path) = convert(bad, &[]);
        assert!(code == Some(2) && said.contains(".gguf") && !path.exists(), "{said}");
    }
    // without blocks it is proven and hashed while it is written, as any other file
    let plain = out.path().join("plain.gguf");
    let done = run(vit_convert().arg(&digits).arg(&plain));
    assert_eq!(done, (Some(0), String::new()));
    let plain = vit_model::checkpoint::open(&plain).unwrap();
    assert!(
        plain.info.verified.unwrap().distance().is_some()
            && plain.info.source.sha256() == checkpoint.info.source.sha256()
    );
    let exact = vit_model::checkpoint::open(&digits.with_extension("safetensors")).unwrap().weights;
    for name in exact.tensors().keys() {
        assert!(!plain.weights.is_q8_0(name), "{name}");
        assert_eq!(plain.weights.read(name).unwrap(), exact.read(name).unwrap(), "{name}");
    }
    // and back: the values that the blocks stand for
    let back = out.path().join("back.safetensors");
    let done = run(vit_convert().arg(&gguf).arg(&back));
    assert_eq!(done, (Some(0), String::new()));
    let back = vit_model::checkpoint::open(&back).unwrap();
    for name in back.weights.tensors().keys() {
        assert_eq!(back.weights.read_f32(name).unwrap(), checkpoint.weights.read_f32(name).unwrap(), "{name}");
    }
}

/// Threads, locale, time zone and the folder that it runs in must not show in the bytes.
#[test]
fn the_same_input_gives_the_same_bytes() {
    let cases =
        ["timm-base-l17-script", "hf-dinov2-swiglu-l17-sdpa", "post-int8-dynamic-timm-l17", "tv-vit-l17-nofold"];
    for case in cases {
        let mut first: Option<Vec<Vec<u8>>> = None;
        for (threads, locale, zone) in
            [("1", "C", "UTC"), ("2", "tr_TR.UTF-8", "Asia/Tokyo"), ("2", "de_DE.UTF-8", "UTC")]
        {
            let home = tempfile::tempdir().unwrap();
            let mut written = Vec::new();
            for target in ["m.safetensors", "timm/", "hf/"] {
                let to: &[&str] = if target == "hf/" { &["--to", "hf"] } else { &[] };
                let mut command = vit_convert();
                command.arg(std::fs::canonicalize(fixture(case)).unwrap()).arg(target).args(to);
                command.current_dir(home.path()).args(["--threads", threads]).args(["--report", "report.json"]);
                command.env("RAYON_NUM_THREADS", threads).env("LC_ALL", locale).env("LANG", locale).env("TZ", zone);
                let (code, said) = run(&mut command);
                assert!(code == Some(0) || said.contains("timm has no") || said.contains("--to hf"), "{case}: {said}");
                written.push(std::fs::read(home.path().join("report.json")).unwrap());
                if target == "m.safetensors" {
                    // without a report the proof runs beside the writing
                    let mut command = vit_convert();
                    command.arg(std::fs::canonicalize(fixture(case)).unwrap()).arg("beside.safetensors");
                    command.current_dir(home.path()).args(["--threads", threads]).env("RAYON_NUM_THREADS", threads);
                    assert_eq!(run(&mut command), (Some(0), String::new()));
                    let [one, other] = [target, "beside.safetensors"].map(|name| std::fs::read(home.path().join(name)));
                    assert!(one.unwrap() == other.unwrap(), "{case}: the bytes say how they were written");
                }
                for name in
                    [target, "timm/model.safetensors", "timm/config.json", "hf/model.safetensors", "hf/config.json"]
                {
                    written.extend(std::fs::read(home.path().join(name)));
                }
            }
            assert!(written.len() >= 4, "{case}");
            match &first {
                None => first = Some(written),
                Some(first) => assert!(*first == written, "{case}: {threads} threads, {locale}, {zone}"),
            }
        }
    }
}

/// Nothing is mapped, so that no moment is left in which a signal ends the process.
#[test]
fn a_file_that_is_cut_during_the_conversion_is_an_error() {
    let whole = std::fs::read(fixture("timm-base-d18-fused")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("m.onnx"), folder.path().join("m.safetensors"));
    for step in 0..12 {
        std::fs::write(&input, &whole).unwrap();
        let child = vit_convert()
            .arg(&input)
            .arg(&output)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(step * 4));
        std::fs::OpenOptions::new().write(true).open(&input).unwrap().set_len(whole.len() as u64 / 3).unwrap();
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        match done.status.code() {
            Some(0) => assert!(vit_model::checkpoint::open(&output).is_ok(), "step {step}"),
            Some(2) => assert!(said.contains("m.onnx") && !output.exists(), "step {step}: {said}"),
            _ => panic!("step {step}: {:?}: {said}", done.status),
        }
        let _ = std::fs::remove_file(&output);
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "a temporary is left");
}
