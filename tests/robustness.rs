//! Files that change while they are read, and files broken at random: an error, never a panic, a hang or a wrong answer.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use vit_convert::{Options, Verify, convert};
use vit_model::{Format, Weights as _, checkpoint::safetensors::Safetensors};

use crate::support::{Done, Parts, Random, finish, root, unproven, vit_cli, write_to};

fn zoo(case: &str) -> std::path::PathBuf {
    root().join("tests/fixtures/zoo").join(case).join("model.onnx")
}

#[test]
fn a_model_that_changes_between_reading_and_writing_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("m.onnx"), folder.path().join("m.safetensors"));
    let whole = fs::read(zoo("timm-base-d18-fused")).unwrap();
    for verify in [Verify::Skip, Verify::Run] {
        for change in ["none", "shorter", "empty", "longer", "written", "replaced"] {
            fs::write(&input, &whole).unwrap();
            let converted = convert(&input, &Options::new().verify(verify)).unwrap();
            let open = || File::options().write(true).open(&input).unwrap();
            match change {
                "shorter" => open().set_len(whole.len() as u64 / 2).unwrap(),
                "empty" => open().set_len(0).unwrap(),
                "longer" => open().set_len(whole.len() as u64 + 1).unwrap(),
                "written" => open().set_modified(SystemTime::now() + Duration::from_secs(2)).unwrap(),
                // the file that was opened is still there, whole
                "replaced" => {
                    fs::write(folder.path().join("other"), b"another file").unwrap();
                    fs::rename(folder.path().join("other"), &input).unwrap();
                }
                _ => (),
            }
            let good = matches!(change, "none" | "replaced");
            match write_to(&output, &converted) {
                Ok(()) => assert!(good && vit_model::checkpoint::open(&output).is_ok(), "{change}"),
                Err(error) => {
                    let said = error.to_string();
                    assert!(!good && said.contains("m.onnx") && said.contains("convert it again"), "{change}: {said}");
                }
            }
            assert_eq!(output.exists(), good, "{change}");
            let _ = fs::remove_file(&output);
        }
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "a temporary is left");
}

#[test]
fn a_checkpoint_that_becomes_shorter_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    fs::copy(root().join("weights/digits/model.safetensors"), &path).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let names: Vec<String> = file.tensors().keys().cloned().collect();
    assert!(names.iter().all(|name| file.read(name).is_ok()));
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let failed = names.iter().filter_map(|name| file.read(name).err()).map(|error| error.to_string());
    let failed: Vec<String> = failed.collect();
    assert!(failed.len() >= names.len() - 1 && failed.iter().all(|said| said.contains("m.safetensors")), "{failed:?}");
}

/// Cut at any moment: the answer of the whole file, or an error that names it; never a signal, as under a map.
#[test]
fn a_model_that_is_cut_during_a_run_is_an_error_or_was_read() {
    let whole = fs::read(root().join("weights/digits/model.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let sample = root().join("weights/digits/samples/3.png");
    let mut command = vit_cli();
    command.args(["predict", "--format", "csv", "--model"]).arg(&path).arg(&sample);
    fs::write(&path, &whole).unwrap();
    let answer = finish(&mut command).good();
    let mut failed = 0;
    for step in 0..24 {
        fs::write(&path, &whole).unwrap();
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(step * 500));
        File::options().write(true).open(&path).unwrap().set_len(whole.len() as u64 / 2).unwrap();
        let done = Done::from(child.wait_with_output().unwrap());
        if done.code == Some(0) {
            assert_eq!(done.stdout, answer, "step {step}");
        } else {
            failed += 1;
            done.bad(2, &["m.safetensors"]);
        }
    }
    assert!(failed > 0, "never cut in time");
}

/// Breaks files at random.
trait Break {
    fn place(&mut self, bytes: &[u8]) -> usize;
    fn broken(&mut self, seeds: &[Vec<u8>]) -> Vec<u8>;
}

impl Break for Random {
    /// A place in a file; mostly one near text, where names and structure are rather than weights.
    fn place(&mut self, bytes: &[u8]) -> usize {
        for _ in 0..32 {
            let at = self.below(bytes.len());
            let around = &bytes[at.saturating_sub(4)..(at + 8).min(bytes.len())];
            let text = around.iter().filter(|b| b.is_ascii_graphic() || **b == b' ').count();
            if text * 3 >= around.len() * 2 {
                return at.saturating_sub(self.below(6));
            }
        }
        self.below(bytes.len())
    }

    /// A file broken in one to four places.
    fn broken(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
        const TEXTS: [&[u8]; 9] =
            [b"-1", b"1e999", b"NaN", b"null", b"{", b"]", b"\"", b"18446744073709551616", b"\xff\xff\xff\xff\x0f"];
        let mut bytes = self.pick(seeds).unwrap().clone();
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return bytes;
            }
            let at = self.place(&bytes);
            let end = (at + 1 + self.below(16)).min(bytes.len());
            match self.below(9) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.below(256) as u8,
                2 => drop(bytes.drain(at..end)),
                3 => bytes.truncate(at),
                4 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
                5 => {
                    let number = self.pick(&NUMBERS).unwrap().to_le_bytes();
                    let n = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
                    bytes[at..at + n].copy_from_slice(&number[..n]);
                }
                6 => drop(bytes.splice(at..end, self.pick(&TEXTS).unwrap().to_vec())),
                7 => {
                    let other = self.pick(seeds).unwrap();
                    let from = self.below(other.len());
                    let part = other[from..(from + 1 + self.below(64)).min(other.len())].to_vec();
                    drop(bytes.splice(at..end, part));
                }
                // a digit is another digit
                _ => {
                    if let Some(digit) = bytes[at..].iter_mut().take(64).find(|b| b.is_ascii_digit()) {
                        *digit = b'0' + self.below(10) as u8;
                    }
                }
            }
        }
        bytes
    }
}

/// Feeds broken files to a reader; returns how many it accepted. `VIT_BROKEN` multiplies the number of files,
/// `VIT_BROKEN_SEED` sets the seed; `fuzz/` does the same guided by coverage.
fn feed(what: &str, count: usize, seeds: &[Vec<u8>], mut read: impl FnMut(&[u8]) -> bool) -> usize {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let count = count * number("VIT_BROKEN", 1) as usize;
    let seed = number("VIT_BROKEN_SEED", 1);
    assert!(seeds.len() > 2 && seeds.iter().all(|seed| read(seed)), "{what}: a seed is refused");
    let mut accepted = 0;
    for k in 0..count {
        let bytes = Random(seed << 32 | k as u64).broken(seeds);
        let start = std::time::Instant::now();
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&bytes)));
        if read.is_err() {
            let kept = std::env::temp_dir().join(format!("vit-broken-{seed}-{k}.{what}"));
            fs::write(&kept, &bytes).unwrap();
            panic!("{what}: file {k} of seed {seed} panics, see above; it is kept as {}", kept.display());
        }
        accepted += usize::from(matches!(read, Ok(true)));
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what}: file {k} of seed {seed} takes {:?}",
            start.elapsed()
        );
    }
    println!("{what}: {count} files, {accepted} accepted");
    accepted
}

fn files(paths: impl IntoIterator<Item = std::path::PathBuf>) -> Vec<Vec<u8>> {
    paths
        .into_iter()
        .map(|path| fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .collect()
}

#[test]
fn broken_onnx_files_are_errors() {
    let seeds = files(
        ["timm-base-d18-fused", "timm-base-l9-eager", "hf-vit-l17-eager", "tv-vit-l17-nofold", "post-ortvit-timm-l14e"]
            .map(zoo),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    feed("onnx", 4000, &seeds, |bytes| {
        fs::write(&path, bytes).unwrap();
        convert(&path, &unproven()).is_ok()
    });
}

#[test]
fn broken_checkpoints_are_errors() {
    let parity = |case: &str| root().join("tests/fixtures/parity/timm").join(case).join("model.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let ours = |case: &str| {
        let output = folder.path().join("seed.safetensors");
        write_to(&output, &convert(zoo(case), &unproven()).unwrap()).unwrap();
        fs::read(&output).unwrap()
    };
    let mut seeds = files([root().join("weights/digits/model.safetensors")]);
    seeds.extend(["timm-base-d18-fused", "hf-clip-l17-sdpa", "timm-swiglu-l16"].map(ours));
    // without checksums, so that what is broken is not found before it is used; one with them
    for seed in &mut seeds[1..] {
        let mut parts = Parts::of(seed);
        parts.without_checksums();
        *seed = parts.bytes();
    }
    let path = folder.path().join("m.safetensors");
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let Ok(checkpoint) = vit_model::checkpoint::open(&path) else { return false };
        checkpoint.weights.tensors().keys().all(|name| checkpoint.weights.read_f32(name).is_ok())
    };
    feed("safetensors", 8000, &seeds, read);
    // names that are not ours, in a file without a document
    let others = files(["vit_base_patch16_224", "test_vit4", "flexivit_small"].map(parity));
    feed("header", 4000, &others, |bytes| {
        fs::write(&path, bytes).unwrap();
        let Ok(file) = Safetensors::open(&path) else { return false };
        file.tensors().keys().all(|name| file.read(name).is_ok())
    });
}

#[test]
fn broken_gguf_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let seeds = ["timm-base-d18-fused", "hf-clip-l17-sdpa", "timm-swiglu-l16"].map(|case| {
        let mut converted = convert(zoo(case), &unproven()).unwrap();
        converted.quantise().unwrap();
        converted.save(&path, Format::Gguf).unwrap();
        fs::read(&path).unwrap()
    });
    feed("gguf", 4000, &seeds, |bytes| {
        fs::write(&path, bytes).unwrap();
        let Ok(checkpoint) = vit_model::checkpoint::open(&path) else { return false };
        checkpoint.weights.tensors().keys().all(|name| checkpoint.weights.read_f32(name).is_ok())
    });
}

#[test]
fn broken_configurations_and_labels_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, cases, name) in [
        ("timm", ["vit_base_patch16_224", "test_vit4", "flexivit_small"], "config.json"),
        ("hf", ["vit_cls", "dinov2_cls", "siglip_vision"], "config.json"),
        ("hf", ["vit_cls", "dinov2_cls", "siglip_vision"], "preprocessor_config.json"),
    ] {
        for case in cases {
            let source = root().join("tests/fixtures/parity").join(kind).join(case);
            for file in ["model.safetensors", "config.json", "preprocessor_config.json"] {
                if source.join(file).is_file() {
                    fs::copy(source.join(file), folder.path().join(file)).unwrap();
                }
            }
            let Ok(seed) = fs::read(source.join(name)) else { continue };
            feed(&format!("{case}.{name}"), 1000, &vec![seed; 3], |bytes| {
                fs::write(folder.path().join(name), bytes).unwrap();
                let Ok(checkpoint) = vit_model::checkpoint::open(folder.path()) else { return false };
                vit_model::image::Preprocess::new(&checkpoint.info.preprocess).is_ok()
            });
        }
    }
    let mut seeds = files([root().join("weights/digits/labels.txt")]);
    seeds.extend([br#"{"0": "daisy", "1": "dandelion"}"#.to_vec(), br#"["daisy", "dandelion"]"#.to_vec()]);
    feed("labels", 10000, &seeds, |bytes| vit_model::labels::parse(bytes).is_ok());
}

#[test]
fn broken_images_are_errors() {
    use vit_model::{
        PreprocessConfig,
        image::{Image, Preprocess},
    };
    let folders = ["tests/fixtures/images", "tests/fixtures/preprocess/images"].map(|name| root().join(name));
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let mut paths: Vec<_> =
        entries.map(|entry| entry.unwrap().path()).filter(|path| Image::open(path).is_ok()).collect();
    paths.sort();
    assert!(paths.len() >= 20, "{paths:?}");
    let preprocess = Preprocess::new(&PreprocessConfig::new([3, 24, 32])).unwrap();
    feed("images", 6000, &files(paths), |bytes| {
        let Ok(image) = Image::decode(bytes) else { return false };
        preprocess.apply(&image).is_ok_and(|pixels| pixels.len() == 3 * 24 * 32 && pixels.iter().all(|v| v.is_finite()))
    });
}

/// Numbers that no arithmetic on sizes may overflow on: a ratio without bounds, and a shape that is empty but for a
/// product of its other dimensions that no number holds.
#[test]
fn sizes_that_overflow_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let from =
        |case: &str, name: &str| fs::read(root().join("tests/fixtures/parity/hf").join(case).join(name)).unwrap();
    let refused = |config: &[u8], weights: &[u8], text: &str| {
        fs::write(folder.path().join("config.json"), config).unwrap();
        fs::write(folder.path().join("model.safetensors"), weights).unwrap();
        let said = vit_model::checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(said.contains(text), "{said}");
    };
    let mut config: serde_json::Value = serde_json::from_slice(&from("dinov2_cls", "config.json")).unwrap();
    for swiglu in [false, true] {
        config["mlp_ratio"] = 1e300.into();
        config["use_swiglu_ffn"] = swiglu.into();
        refused(config.to_string().as_bytes(), &from("dinov2_cls", "model.safetensors"), "mlp_");
    }

    let weights = from("siglip_vision", "model.safetensors");
    let (length, rest) = weights.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&rest[..length]).unwrap();
    let entries = header.as_object_mut().unwrap();
    let name = entries.keys().find(|name| name.ends_with("in_proj_weight")).unwrap().clone();
    let begin = entries[&name]["data_offsets"][0].as_u64().unwrap();
    let end = entries[&name]["data_offsets"][1].as_u64().unwrap();
    for (_, entry) in entries.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        for at in 0..2 {
            let offset = entry["data_offsets"][at].as_u64().unwrap();
            entry["data_offsets"][at] = if offset >= end { offset - (end - begin) } else { offset }.into();
        }
    }
    entries[&name] = serde_json::json!({ "dtype": "F32", "shape": [0, 1u64 << 62, 8], "data_offsets": [begin, begin] });
    let header = header.to_string();
    let data = &rest[length..];
    let broken =
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data[..begin as usize], &data[end as usize..]]
            .concat();
    refused(&from("siglip_vision", "config.json"), &broken, "in_proj_weight");
}

/// Weights that are finite, and products that are not: every command refuses the answer and names the module.
#[test]
fn an_answer_that_is_not_finite_is_refused_and_its_module_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let sample = root().join("weights/digits/samples/3.png");
    let whole = fs::read(root().join("weights/digits/model.safetensors")).unwrap();
    for (tensor, module) in
        [("patch_embed.proj.weight", "patch_embed"), ("blocks.1.mlp.fc2.weight", "blocks.1"), ("head.weight", "head")]
    {
        let mut parts = Parts::of(&whole);
        parts.without_checksums();
        let range = parts.range(tensor);
        let wide = parts.header[tensor]["dtype"] == "F32";
        for (k, value) in parts.data[range].chunks_exact_mut(if wide { 4 } else { 2 }).enumerate() {
            let large = if k % 2 == 0 { 3e38_f32 } else { 2.9e38 };
            match value.len() {
                4 => value.copy_from_slice(&large.to_le_bytes()),
                _ => value.copy_from_slice(&half::bf16::from_f32(large).to_le_bytes()),
            }
        }
        if !wide {
            parts.header[tensor]["dtype"] = "BF16".into();
        }
        fs::write(at("m.safetensors"), parts.bytes()).unwrap();
        let x = at("x.safetensors");
        finish(vit_cli().arg("preprocess").arg(at("m.safetensors")).arg(&sample).arg("-o").arg(&x)).good();
        for more in [&["--precision", "f32"][..], &["--precision", "bf16x3"], &["--precision", "bf16"], &["--modules"]]
        {
            let run = |args: &[&str]| {
                let mut command = vit_cli();
                command.args(args).args(more).current_dir(folder.path());
                command
            };
            let says = format!("is `{module}`");
            let sample = sample.to_str().unwrap();
            for args in [
                &["predict", sample, "-m", "m.safetensors"][..],
                &["predict", sample, sample, "-m", "m.safetensors", "--batch", "2"],
                &["embed", sample, "-m", "m.safetensors"],
                &["forward", "m.safetensors", "--input", "x.safetensors", "-t", "pixel_values", "-o", "y.safetensors"],
                &["compare", "m.safetensors", "m.safetensors", "--inputs", "1"],
                &["compare", "digits", "m.safetensors", "--inputs", "1"],
                &["bench", "m.safetensors", "--iters", "1", "--warmup", "0"],
            ] {
                let done = finish(&mut run(args));
                if done.stderr.contains("not supported") {
                    continue; // a precision that this CPU lacks
                }
                // what the head reads is good if the head alone is not
                if args[0] == "embed" && module == "head" {
                    done.good();
                    continue;
                }
                let code = if args[0] == "predict" || args[0] == "embed" { 1 } else { 2 };
                let done = done.bad(code, &[&says]);
                assert!(!done.stdout.contains("NaN") && !at("y.safetensors").exists(), "{done:?}");
            }
        }
        let mut explain = vit_cli();
        explain.arg("explain").arg(&sample).args(["-m", "m.safetensors", "-o", "e.png"]).current_dir(folder.path());
        if module == "patch_embed" {
            finish(&mut explain).bad(2, &["is `patch_embed`"]);
        }
    }
}

/// A name that is an image at one moment and a pipe at the next: no command waits for a writer.
#[cfg(unix)]
#[test]
fn a_name_that_turns_into_a_pipe_does_not_block() {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::copy(root().join("weights/digits/samples/3.png"), at("image.png")).unwrap();
    fs::copy(root().join("weights/digits/model.safetensors"), at("model.safetensors")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (target, name) in [("image.png", "i"), ("model.safetensors", "m")] {
                    for target in ["pipe", target] {
                        symlink(target, at("new")).unwrap();
                        fs::rename(at("new"), at(name)).unwrap();
                    }
                }
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_secs(3) {
            let mut command = vit_cli();
            command.args(["predict", "-m", "m"]).args(["i"; 200]).current_dir(folder.path());
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let begun = std::time::Instant::now();
            let ended = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break Some(status),
                    None if begun.elapsed() > Duration::from_secs(20) => break None,
                    None => std::thread::sleep(Duration::from_millis(2)),
                }
            };
            if ended.is_none() {
                child.kill().unwrap();
            }
            stop.store(ended.is_none(), Ordering::Relaxed);
            assert!(ended.is_some_and(|status| matches!(status.code(), Some(0..=2))), "{ended:?}");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Whole files that take each other's place: each answer is that of one of them.
#[test]
fn an_image_that_is_replaced_meanwhile_is_one_of_the_two() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let samples = ["3", "8"].map(|name| fs::read(root().join(format!("weights/digits/samples/{name}.png"))).unwrap());
    let run = || {
        let mut command = vit_cli();
        command.args(["embed", "--batch", "1", "i.png"]).args(["i.png"; 60]).current_dir(folder.path());
        finish(&mut command)
    };
    let answers = samples.each_ref().map(|sample| {
        fs::write(at("i.png"), sample).unwrap();
        run().good().lines().next().unwrap().to_owned()
    });
    for atomic in [true, false] {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for sample in &samples {
                        let to = if atomic { at("new") } else { at("i.png") };
                        fs::write(&to, sample).unwrap();
                        if atomic {
                            fs::rename(to, at("i.png")).unwrap();
                        }
                    }
                }
            });
            let done: Vec<Done> = (0..8).map(|_| run()).collect();
            stop.store(true, Ordering::Relaxed);
            for done in done {
                assert!(done.code == Some(0) || (!atomic && done.code == Some(1)), "{done:?}");
                for line in done.stdout.lines() {
                    let error = line.contains("\"error\"") && !atomic;
                    assert!(error || answers.iter().any(|answer| answer == line), "{line}");
                }
            }
        });
    }
}

/// What is no image on standard input is refused by its first bytes, whether it ends or not.
#[cfg(target_os = "linux")]
#[test]
fn endless_input_that_is_no_image_ends() {
    for command in [&["predict", "-"][..], &["embed", "-"], &["explain", "-", "-o", "never.png"]] {
        let start = std::time::Instant::now();
        let mut yes = std::process::Command::new("yes").stdout(Stdio::piped()).spawn().unwrap();
        let done = finish(vit_cli().args(command).stdin(yes.stdout.take().unwrap()));
        let _ = (yes.kill(), yes.wait());
        let code = if command[0] == "explain" { 2 } else { 1 };
        done.bad(code, &["it looks like text"]);
        finish(vit_cli().args(command).stdin(File::open("/dev/zero").unwrap())).bad(code, &["no known format"]);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}
