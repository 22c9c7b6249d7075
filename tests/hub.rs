//! Repository ids on the command line, out of a cache as Python's `huggingface_hub` leaves it.

use std::fs;

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
