//! Repository ids on the command line, out of a cache as Python's `huggingface_hub` leaves it.

use std::fs;
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{finish, root, vit_cli};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[test]
fn a_repository_in_the_cache_is_a_model() {
    let home = tempfile::tempdir().unwrap();
    let repo = home.path().join("hub/models--owner--model");
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    let folder = root().join("tests/fixtures/parity/timm/test_vit4");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(folder.join(name), snapshot.join(name)).unwrap();
    }
    let cli = |args: &[&str]| finish(vit_cli().env("HF_HOME", home.path()).env_remove("HF_HUB_CACHE").args(args));
    let expected = finish(vit_cli().arg("summary").arg(&folder)).good();
    for id in ["owner/model", "owner/model@main", "hf-hub:owner/model"] {
        assert_eq!(cli(&["summary", id]).good().lines().count(), expected.lines().count());
    }
    cli(&["summary", "owner/other"]).bad(2, &["owner/other", "HF_HUB_OFFLINE", "vit-cli pull owner/other"]);
    cli(&["pull", "owner/model"]).bad(2, &["HF_HUB_OFFLINE"]);
    cli(&["pull", "owner"]).bad(2, &["is not a repository id"]);

    // a short name is a repository's, and the list says what is there
    cli(&["summary", "vit-tiny"]).bad(2, &["timm/vit_tiny_patch16_224", "HF_HUB_OFFLINE"]);
    let table = cli(&["models"]).good();
    assert!(table.contains("vit-tiny") && table.contains("owner/model"), "{table}");
    let list: serde_json::Value = serde_json::from_str(&cli(&["models", "--json"]).good()).unwrap();
    assert_eq!(list["cached"][0]["repository"], "owner/model");
    assert!(list["cached"][0]["bytes"].as_u64().unwrap() > 1000);
    assert!(list["known"].as_array().unwrap().iter().all(|known| known["cached"] == false));
}

/// A server that counts: without HF_HUB_OFFLINE it is asked, with it nobody is, nor for a model that needs no network.
#[test]
fn offline_nobody_is_asked() {
    let home = tempfile::tempdir().unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let endpoint = format!("http://{}", server.local_addr().unwrap());
    let sample = root().join("weights/digits/samples/3.png");
    let asked = |offline: Option<&str>, model: &str| {
        let mut command = vit_cli();
        command.env("HF_HOME", home.path()).env("HF_ENDPOINT", &endpoint).env_remove("HF_HUB_CACHE");
        match offline {
            Some(value) => command.env("HF_HUB_OFFLINE", value),
            None => command.env_remove("HF_HUB_OFFLINE"),
        };
        let started = Instant::now();
        command.args(["predict", "--model", model]).arg(&sample).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        loop {
            if server.accept().is_ok() {
                // closed at once: no Hub
                while server.accept().is_ok() {}
                let _ = child.kill();
                let _ = child.wait();
                return true;
            }
            if child.try_wait().unwrap().is_some() {
                assert!(offline.is_none() || started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
                return server.accept().is_ok();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    assert!(asked(None, "owner/model"));
    for offline in ["1", "true"] {
        assert!(!asked(Some(offline), "owner/model"), "{offline}");
    }
    for model in ["digits", root().join("weights/digits/model.onnx").to_str().unwrap()] {
        assert!(!asked(None, model), "{model}");
    }
}
