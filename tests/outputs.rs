//! No output replaces a file that the run reads: every command that writes, every file that it reads, however it is named.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use safetensors::Dtype;

use crate::support::{Done, bytes, root, vit_cli, write_safetensors};

/// Copies a folder with what is in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(drop).unwrap() }
    }
}

/// Every file, links not followed, with its content.
fn all(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.append(&mut all(&path));
        } else {
            found.insert(path.clone(), if kind.is_file() { fs::read(&path).unwrap() } else { b"link".to_vec() });
        }
    }
    found
}

/// Splits a model into two shards with an index, as transformers saves large models.
fn shard(folder: &Path) {
    let whole = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut tensors: Vec<_> = file.iter().collect();
    tensors.sort_by_key(|(name, _)| name.to_owned());
    let half = tensors.len() / 2;
    let mut map = serde_json::Map::new();
    for (k, part) in [&tensors[..half], &tensors[half..]].into_iter().enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", k + 1);
        map.extend(part.iter().map(|(tensor, _)| ((*tensor).to_owned(), name.clone().into())));
        let part = part.iter().map(|(name, view)| (*name, view));
        fs::write(folder.join(name), safetensors::serialize(part, None).unwrap()).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
}

struct Case {
    args: Vec<String>,
    stdin: Option<PathBuf>,
    inputs: Vec<PathBuf>,
}

impl Case {
    fn new(args: &[&str], inputs: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { args: args.iter().map(|&arg| arg.into()).collect(), stdin: None, inputs: inputs.into_iter().collect() }
    }

    fn run(&self, folder: &Path, output: &str) -> Done {
        let mut command = vit_cli();
        command.args(&self.args).arg("--output").arg(output).current_dir(folder);
        if let Some(stdin) = &self.stdin {
            command.stdin(Stdio::from(fs::File::open(stdin).unwrap()));
        }
        Done::from(command.output().unwrap())
    }
}

#[test]
fn no_command_replaces_a_file_that_it_reads() {
    let root_folder = tempfile::tempdir().unwrap();
    let folder = root_folder.path();
    let at = |name: &str| folder.join(name);
    let fixtures = root().join("tests/fixtures");
    for (from, to) in [
        ("parity/hf/vit_cls", "plain"),
        ("parity/hf/vit_cls", "shards"),
        ("two_tower/clip", "clip"),
        ("zoo/post-external-manyfiles-timm-l11", "onnx"),
    ] {
        copy(&fixtures.join(from), &at(to));
    }
    shard(&at("shards"));
    fs::create_dir(at("photos")).unwrap();
    fs::create_dir(at("photos/inner")).unwrap();
    for name in ["a.png", "photos/b.png", "photos/inner/c.png"] {
        fs::copy(root().join("weights/digits/samples/0.png"), at(name)).unwrap();
    }
    fs::copy(root().join("weights/digits/model.safetensors"), at("digits.safetensors")).unwrap();
    write_safetensors(&at("x.safetensors"), "x", Dtype::F32, &[1, 3, 32, 32], &bytes(&[0.5; 3 * 32 * 32]));

    let of = |model: &str, names: &[&str]| names.iter().map(|name| at(model).join(name)).collect::<Vec<_>>();
    let plain = || of("plain", &["config.json", "preprocessor_config.json", "model.safetensors"]);
    let image = || vec![at("a.png")];
    let mut cases = Vec::new();
    for args in [
        &["embed", "a.png", "-m", "plain"],
        &["explain", "a.png", "-m", "plain"],
        &["preprocess", "plain", "a.png"][..],
    ] {
        cases.push(Case::new(args, [plain(), image()].concat()));
    }
    for format in ["json", "csv", "safetensors"] {
        cases.push(Case::new(&["embed", "a.png", "-m", "plain", "--format", format], [plain(), image()].concat()));
    }
    // of a folder's files, those too that the command does not open
    let shards = of(
        "shards",
        &[
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "config.json",
        ],
    );
    cases.push(Case::new(&["embed", "a.png", "-m", "shards"], shards.clone()));
    cases.push(Case::new(&["preprocess", "shards", "a.png"], shards));
    let text = fs::read_dir(at("clip")).unwrap().map(|entry| entry.unwrap().path());
    let text: Vec<_> = text
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            !["expect", "meta", "texts."].iter().any(|other| name.starts_with(other)) && path.is_file()
        })
        .filter(|path| ["json", "txt", "safetensors"].iter().any(|end| path.extension().is_some_and(|e| e == *end)))
        .collect();
    assert!(text.len() >= 4, "{text:?}");
    cases.push(Case::new(&["embed", "-m", "clip", "--text", "a cat"], text.clone()));
    cases.push(Case::new(&["embed", "-m", "clip", "a.png"], text));
    let external = fs::read_dir(at("onnx")).unwrap().map(|entry| entry.unwrap().path());
    let external: Vec<_> = external
        .filter(|path| path.extension().is_none_or(|end| end == "onnx") || path.to_string_lossy().contains("weight"))
        .collect();
    assert!(external.len() > 10, "{external:?}");
    cases.push(Case::new(&["embed", "a.png", "-m", "onnx/model.onnx"], external.into_iter().take(4)));
    // one file of weights with all of its document, a tensor as the input
    let digits = || vec![at("digits.safetensors")];
    cases.push(Case::new(&["embed", "a.png", "-m", "digits.safetensors"], digits()));
    cases.push(Case::new(
        &["forward", "digits.safetensors", "--input", "x.safetensors"],
        [digits(), vec![at("x.safetensors")]].concat(),
    ));
    // images that a folder supplies, at any depth
    let photos = || vec![at("photos/b.png"), at("photos/inner/c.png")];
    for format in ["jsonl", "safetensors"] {
        cases.push(Case::new(&["embed", "photos", "--format", format], photos()));
    }
    let mut stdin = Case::new(&["embed", "-"], image());
    stdin.stdin = Some(at("a.png"));
    cases.push(stdin);

    let before = all(folder);
    let mut refused = 0;
    for case in &cases {
        for input in &case.inputs {
            let name = input.strip_prefix(folder).unwrap().to_str().unwrap();
            let mut names = vec![name.to_owned(), format!("photos/../{name}")];
            #[cfg(unix)]
            {
                std::os::unix::fs::symlink(input, at("soft")).unwrap();
                fs::hard_link(input, at("hard")).unwrap();
                names.extend(["soft".into(), "hard".into()]);
            }
            // external data with a second link are refused anyway, with another message
            let links = !case.args.iter().any(|arg| arg.contains("onnx"));
            for output in names {
                let done = case.run(folder, &output);
                if links || !fs::exists(at("hard")).unwrap() {
                    done.bad(2, &["is the input"]);
                } else {
                    done.bad(2, &[]);
                }
                refused += 1;
            }
            let _ = (fs::remove_file(at("soft")), fs::remove_file(at("hard")));
            assert!(all(folder) == before, "{:?} over {name}", case.args);
        }
        // a file that the run does not read may be replaced
        fs::write(at("old"), "old").unwrap();
        case.run(folder, "old").good();
        assert_ne!(fs::read(at("old")).unwrap(), b"old", "{:?}", case.args);
        fs::remove_file(at("old")).unwrap();
    }
    assert!(refused > 100, "{refused}");
}

/// Names that are not UTF-8, that hold lines or quotes, or that look like the escape of another: each is in every format, and
/// none is another's.
#[cfg(target_os = "linux")]
#[test]
fn every_name_can_be_recovered_from_every_format() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempfile::tempdir().unwrap();
    let names: [&[u8]; 12] = [
        b"plain.png",
        b"a\nb.png",
        b"a\\nb.png",
        b"\xff.png",
        b"\xfe.png",
        b"\\xff.png",
        "\u{fffd}.png".as_bytes(),
        b"bytes:%FF.png",
        b"100%.png",
        b"q\"q,q.png",
        b"\x1b[31m.png",
        b"tab\t.png",
    ];
    for name in names {
        let path = folder.path().join(std::ffi::OsStr::from_bytes(name));
        fs::copy(root().join("weights/digits/samples/0.png"), path).unwrap();
    }
    let wanted: std::collections::BTreeSet<Vec<u8>> = names.iter().map(|name| name.to_vec()).collect();
    let run = |args: &[&str]| {
        let mut command = vit_cli();
        command.args(args).args(names.map(std::ffi::OsStr::from_bytes)).current_dir(folder.path());
        Done::from(command.output().unwrap()).good()
    };
    let same = |what: &str, found: Vec<String>| {
        let found: Vec<Vec<u8>> = found.iter().map(|name| vit_model::printable::recover(name)).collect();
        assert_eq!(found, names.map(<[u8]>::to_vec), "{what}");
        assert_eq!(found.into_iter().collect::<std::collections::BTreeSet<_>>(), wanted, "{what}");
    };
    let of = |value: &serde_json::Value| value["file"].as_str().unwrap().to_owned();
    for command in ["predict", "embed"] {
        let lines = run(&[command, "-f", "jsonl"]);
        same(command, lines.lines().map(|line| of(&serde_json::from_str(line).unwrap())).collect());
        let list: Vec<serde_json::Value> = serde_json::from_str(&run(&[command, "-f", "json"])).unwrap();
        same(command, list.iter().map(of).collect());
        let more: &[&str] = if command == "predict" { &["-k1"] } else { &[] };
        let text = run(&[&[command, "-f", "csv"], more].concat());
        assert!(!text.contains('\u{1b}'));
        let mut rows = csv::Reader::from_reader(text.as_bytes());
        same(command, rows.records().map(|row| row.unwrap()[0].to_owned()).collect());
    }
    let text = run(&["predict", "-k1"]);
    same("text", text.lines().step_by(2).map(str::to_owned).collect());
    let text = run(&["predict", "-f", "seed"]);
    same("seed", text.lines().step_by(11).map(str::to_owned).collect());
    run(&["embed", "-f", "safetensors", "-o", "y.safetensors"]);
    let bytes = fs::read(folder.path().join("y.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let files = header.metadata().as_ref().unwrap()["files"].clone();
    same("safetensors", serde_json::from_str(&files).unwrap());
}
