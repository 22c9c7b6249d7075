//! Pickles by hand: what is refused, what is read, and bytes changed at random.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

use proptest::prelude::*;

use super::*;

/// A zip archive with stored entries, as `torch.save` writes it.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (offset, len) = (out.len() as u32, (data.len() as u32).to_le_bytes());
        let common =
            [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &[0; 4], &len, &len, &(name.len() as u16).to_le_bytes(), &[0, 0]]
                .concat();
        out.extend([b"PK\x03\x04", common.as_slice(), name.as_bytes(), data].concat());
        directory.extend(
            [b"PK\x01\x02\x14\0", common.as_slice(), &[0; 10], &offset.to_le_bytes(), name.as_bytes()].concat(),
        );
    }
    let (start, count) = (out.len() as u32, (entries.len() as u16).to_le_bytes());
    out.extend_from_slice(&directory);
    out.extend(
        [
            b"PK\x05\x06\0\0\0\0",
            &count[..],
            &count,
            &(directory.len() as u32).to_le_bytes(),
            &start.to_le_bytes(),
            &[0, 0],
        ]
        .concat(),
    );
    out
}

fn open(bytes: Vec<u8>) -> Result<Pickle> {
    Pickle::from_bytes(bytes.leak(), None)
}

fn refusal(bytes: Vec<u8>) -> String {
    open(bytes).unwrap_err().to_string()
}

/// `{"w": a tensor of two floats}` with the arguments of its tensor after the storage.
fn one_tensor(rest: &[u8]) -> Vec<u8> {
    let start = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
    [&start[..], rest, b"tRs."].concat()
}

fn stored(pickle: &[u8], data: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", pickle), ("a/data/0", data), ("a/version", b"3\n")])
}

const DATA: [u8; 8] = [0, 0, 0x80, 0x3f, 0, 0, 0, 0x40];

#[test]
fn a_tensor_is_its_storage_with_offset_and_strides() {
    let read = |rest: &[u8]| {
        let file = open(stored(&one_tensor(rest), &DATA)).unwrap();
        (file.tensors()["w"].shape.clone(), file.read_f32("w").unwrap())
    };
    assert_eq!(read(b"K\x00K\x02\x85K\x01\x85\x89}"), (vec![2], vec![1.0, 2.0]));
    assert_eq!(read(b"K\x01K\x01\x85K\x01\x85\x89}"), (vec![1], vec![2.0]));
    assert_eq!(read(b"K\x00K\x02K\x02\x86K\x00K\x01\x86\x89}"), (vec![2, 2], vec![1.0, 2.0, 1.0, 2.0]));
    assert_eq!(read(b"K\x00K\x02K\x02\x86K\x01K\x00\x86\x89}"), (vec![2, 2], vec![1.0, 1.0, 2.0, 2.0]));
    assert_eq!(read(b"K\x01))\x89}"), (vec![], vec![2.0]));
    // an old tensor has no further arguments
    assert_eq!(read(b"K\x00K\x02\x85K\x01\x85"), (vec![2], vec![1.0, 2.0]));
}

#[test]
fn a_tensor_outside_of_its_storage_or_of_any_size_is_refused() {
    let said = |rest: &[u8]| refusal(stored(&one_tensor(rest), &DATA));
    assert!(said(b"K\x01K\x02\x85K\x01\x85\x89}").contains("partly outside of its storage"));
    assert!(said(b"K\x00K\x02\x85K\x02\x85\x89}").contains("partly outside of its storage"));
    assert!(said(b"K\x00J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86K\x01K\x01\x86\x89}").contains("outside"));
    // a few bytes repeated to any number of gigabytes
    assert!(said(b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89}").contains("repeat"));
    assert!(said(b"K\x00K\x02\x85J\xff\xff\xff\xff\x85\x89}").contains("damaged tensor"));
    let flagged = said(b"K\x00K\x02\x85K\x01\x85\x89}}X\x03\0\0\0neg\x88s");
    assert!(flagged.contains("negative"), "{flagged}");
    // a storage that the file does not have, or has less of
    assert!(
        refusal(archive(&[("a/data.pkl", &one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}"))])).contains("the file lacks")
    );
    let short = refusal(stored(&one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}"), &DATA[..4]));
    assert!(short.contains("of 8 bytes, but the file has 4"), "{short}");
}

/// Programs that real attacks and their variations use. None may be read, whatever surrounds it.
#[test]
fn programs_are_refused_by_the_name_that_they_would_call() {
    let canary = std::env::temp_dir().join(format!("vit-canary-{}", std::process::id()));
    let command = format!("touch {}", canary.display());
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let touch = text(&command);
    let call = |global: &str| [format!("c{global}").as_bytes(), &touch, b"\x85R"].concat();
    let programs: Vec<(&str, Vec<u8>)> = vec![
        ("posix.system", call("posix\nsystem\n")),
        ("os.system", call("os\nsystem\n")),
        ("nt.system", call("nt\nsystem\n")),
        ("builtins.eval", call("builtins\neval\n")),
        ("__builtin__.exec", call("__builtin__\nexec\n")),
        ("subprocess.Popen", call("subprocess\nPopen\n")),
        ("builtins.__import__", call("builtins\n__import__\n")),
        ("builtins.getattr", call("builtins\ngetattr\n")),
        ("runpy._run_code", call("runpy\n_run_code\n")),
        ("torch.load", call("torch\nload\n")),
        ("torch.hub.load", call("torch.hub\nload\n")),
        ("torch.storage._load_from_bytes", call("torch.storage\n_load_from_bytes\n")),
        ("numpy.testing._private.utils.runstring", call("numpy.testing._private.utils\nrunstring\n")),
        ("functools.partial", call("functools\npartial\n")),
        ("operator.attrgetter", call("operator\nattrgetter\n")),
        ("pickle.loads", call("pickle\nloads\n")),
        ("torch.FloatStorage.__reduce__", call("torch.FloatStorage\n__reduce__\n")),
        // the other instructions that call
        ("os.system", [b"(", &touch[..], b"ios\nsystem\n"].concat()),
        ("posix.system", [b"(cposix\nsystem\n", &touch[..], b"o"].concat()),
        ("os.popen", [b"cos\npopen\n", &touch[..], b"\x85\x81"].concat()),
        ("os.execv", [b"cos\nexecv\n", &touch[..], b"\x85}\x92"].concat()),
        ("posix.system", [&text("posix")[..], &text("system"), b"\x93", &touch, b"\x85R"].concat()),
        // classes that only a TorchScript archive may have
        ("__torch__.os.system", call("__torch__.os\nsystem\n")),
        // an object whose state would be set
        ("my.Thing", b"cmy\nThing\n)\x81}X\x01\0\0\0aK\x01sb".to_vec()),
    ];
    let good = one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}");
    for (name, program) in programs {
        let inside = |program: &[u8]| [&good[..good.len() - 1], b"X\x01\0\0\0z", program, b"s."].concat();
        for file in [
            stored(&inside(&program), &DATA),
            stored(&[b"\x80\x04", &program[..], b"0", &good[2..]].concat(), &DATA),
            [b"\x80\x02}X\x01\0\0\0z", &program[..], b"s."].concat(),
        ] {
            let said = refusal(file);
            assert!(said.contains(&format!("`{name}`")) && said.contains("Nothing of it was run"), "{name}: {said}");
        }
    }
    // names from the list are not called with what they are not made for, and the registry of extensions is not asked
    for (program, why) in [
        (&b"ctorch\nFloatStorage\n)R"[..], "calls what is no function"),
        (b"X\x01\0\0\0a)R", "calls what is no function"),
        (b"\x82\x01", "registry of extensions"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(X\x01\0\0\0atR", "damaged tensor"),
        (b"P0\n", "storages are named"),
    ] {
        let said = refusal(stored(&[b"\x80\x02", program, b"."].concat(), &DATA));
        assert!(said.contains(why), "{why}: {said}");
    }
    assert!(!canary.exists());
}

#[test]
fn settings_beside_the_weights_are_passed_over() {
    let good = one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}");
    for settings in [
        &b"cargparse\nNamespace\n)\x81}X\x02\0\0\0lrG\0\0\0\0\0\0\0\0sb"[..],
        b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8K\x00K\x01tRU\x08\0\0\0\0\0\0\0\0tR",
        b"c__builtin__\nset\n]K\x01a\x85R",
        b"\x8a\x09\0\0\0\0\0\0\0\0\x01",
    ] {
        let pickle = [&good[..good.len() - 1], b"X\x04\0\0\0args", settings, b"s."].concat();
        assert_eq!(open(stored(&pickle, &DATA)).unwrap().tensors().len(), 1);
    }
}

#[test]
fn an_archive_that_is_two_or_compressed_is_refused() {
    let pickle = one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}");
    let twice = archive(&[("a/data.pkl", &pickle), ("a/data/0", &DATA), ("a/data/0", &DATA)]);
    assert!(refusal(twice).contains("twice"));
    let two = archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle), ("a/data/0", &DATA)]);
    assert!(refusal(two).contains("data.pkl"));
    let big = archive(&[("a/data.pkl", &pickle), ("a/data/0", &DATA), ("a/byteorder", b"big")]);
    assert!(refusal(big).contains("big-endian"));
    // the directory says another method, another place, or more than the file has
    let good = stored(&pickle, &DATA);
    let directory = good.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[directory + at..directory + at + bytes.len()].copy_from_slice(bytes);
        refusal(file)
    };
    assert!(changed(10, &[8]).contains("compressed"));
    assert!(changed(8, &[1]).contains("encrypted"));
    for (at, bytes) in [(24, &[0xff, 0xff, 0xff, 0x7f][..]), (42, &[7]), (28, &[0xff, 0xff])] {
        let said = changed(at, bytes);
        assert!(said.contains("damaged") || said.contains("overlap"), "{said}");
    }
    assert!(refusal(good[..good.len() - 30].to_vec()).contains("copied completely"));
    assert!(refusal(b"PK\x03\x04".to_vec()).contains("directory is damaged"));
}

#[test]
fn a_pickle_cannot_ask_for_more_than_it_has() {
    // a list that is copied again and again: each copy counts
    let mut pickle = b"\x80\x02]q\0(".to_vec();
    pickle.extend(b"K\x01".repeat(20_000));
    pickle.extend(b"e0");
    pickle.extend(b"c__builtin__\nset\nh\0\x85R0".repeat(1000));
    pickle.extend(b"}.");
    let said = refusal(stored(&pickle, &DATA));
    assert!(said.contains("values, which no checkpoint does"), "{said}");
    for (pickle, why) in [
        (&b"\x80\x09."[..], "protocol 9"),
        (b"\x80\x02h\x07.", "has not made"),
        (b"\x80\x02.", "takes more values"),
        (b"\x80\x02(0.", "takes more values"),
        (b"\x80\x02t.", "begins nowhere"),
        (b"\x80\x02X\xff\xff\xff\xff.", "ends too early"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "ends too early"),
        (b"\x80\x02}(", "ends too early"),
        (b"\x80\x02K\x01.", "no state dict"),
        (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "no state dict"),
        (b"\x80\x02\xff.", "no instruction 0xff"),
    ] {
        let said = refusal(stored(pickle, &DATA));
        assert!(said.contains(why), "{why}: {said}");
    }
}

#[test]
fn the_state_dict_is_found_in_timms_order_and_a_choice_is_needed_between_strangers() {
    // {key: {"w": tensor}, …}
    let nested = |keys: &[&str]| {
        let mut pickle = b"\x80\x02}".to_vec();
        for key in keys {
            let inner = one_tensor(b"K\x00K\x02\x85K\x01\x85\x89}");
            pickle.extend([&[b'U', key.len() as u8], key.as_bytes(), &inner[2..inner.len() - 1], b"s"].concat());
        }
        pickle.push(b'.');
        stored(&pickle, &DATA)
    };
    let key = |keys: &[&str]| {
        let file = open(nested(keys)).unwrap();
        (file.key().unwrap_or_default().to_owned(), file.besides().to_vec())
    };
    assert_eq!(key(&["model", "model_ema"]), ("model_ema".into(), vec!["model".into()]));
    assert_eq!(key(&["student", "teacher"]), ("teacher".into(), vec!["student".into()]));
    assert_eq!(key(&["something"]), ("something".into(), vec![]));
    assert!(refusal(nested(&["left", "right"])).contains("--state-dict"));
    let chosen = Pickle::from_bytes(nested(&["left", "right"]).leak(), Some("right")).unwrap();
    assert_eq!(chosen.key(), Some("right"));
    let said = Pickle::from_bytes(nested(&["left", "right"]).leak(), Some("up")).unwrap_err().to_string();
    assert!(said.contains("`left`, `right`"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Real files with some bytes changed, and cut off anywhere: read or refused, never a panic and never more memory than the file.
    #[test]
    fn broken_files_are_read_or_refused(
        which in 0usize..5,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        const FILES: [&[u8]; 5] = [
            include_bytes!("../../../../tests/fixtures/containers/plain/legacy.pth"),
            include_bytes!("../../../../tests/fixtures/containers/plain/settings.pth"),
            include_bytes!("../../../../tests/fixtures/containers/plain/views.pth"),
            include_bytes!("../../../../tests/fixtures/containers/fp8/fp8.pth"),
            include_bytes!("../../../../tests/fixtures/containers/plain/protocol5.pth"),
        ];
        let mut bytes = FILES[which].to_vec();
        // two thirds of the changes hit the pickle or the directory, which say where everything is
        for (at, byte) in changes {
            let len = bytes.len();
            let at = match byte % 3 { 0 => at.index(len), 1 => at.index(len.min(4096)), _ => len - 1 - at.index(len.min(4096)) };
            bytes[at] = byte;
        }
        if let Some(cut) = cut { bytes.truncate(cut.index(bytes.len())); }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.pth");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = Pickle::open(&path, None) {
            for name in file.tensors().keys() {
                if let Ok(read) = file.read(name) {
                    prop_assert!(read.len() <= bytes.len().max(limits::REPEATED * 8) * 2);
                }
            }
        }
    }
}
