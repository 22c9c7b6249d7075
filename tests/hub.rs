//! Repository ids on the command line: out of a cache as Python's `huggingface_hub` leaves it, and from a server on this
//! machine, as the environment says.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};

use crate::support::{Done, finish, root, vit_cli};

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

/// Two hosts that log what they are asked: a Hub with `owner/model`, and the one that it sends clients to for weights.
struct Hosts {
    hub: String,
    cdn: String,
    /// The heads of the requests, in lower case; of the Hub, of the other.
    log: [Mutex<Vec<String>>; 2],
}

impl Hosts {
    fn start() -> Arc<Self> {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, cdn) = (listen(), listen());
        let at = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let hosts = Arc::new(Self { hub: at(&hub), cdn: at(&cdn), log: Default::default() });
        for (which, listener) in [hub, cdn].into_iter().enumerate() {
            let hosts = Arc::clone(&hosts);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    hosts.answer(which, &mut stream.unwrap());
                }
            });
        }
        hosts
    }

    fn answer(&self, which: usize, out: &mut TcpStream) {
        let lines = BufReader::new(out.try_clone().unwrap()).lines();
        let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        self.log[which].lock().unwrap().push(head.join("\n").to_lowercase());
        let mut words = head.first().map(String::as_str).unwrap_or_default().split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let name = path.rsplit('/').next().unwrap_or_default();
        let is_ours = which == 1 || path.starts_with("/owner/model/resolve/main/");
        let Some(bytes) = fs::read(fixture().join(name)).ok().filter(|_| is_ours) else {
            let _ = write!(
                out,
                "HTTP/1.1 404 X\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            return;
        };
        let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let (status, more, len) = if which == 0 && name.ends_with(".safetensors") {
            let more = format!(
                "X-Linked-Etag: \"{digest}\"\r\nX-Linked-Size: {}\r\nLocation: {}/{name}\r\n",
                bytes.len(),
                self.cdn
            );
            (302, more, 0)
        } else {
            (200, format!("ETag: \"{}\"\r\n", &digest[..40]), bytes.len())
        };
        let _ = write!(
            out,
            "HTTP/1.1 {status} X\r\nX-Repo-Commit: {COMMIT}\r\n{more}Content-Length: {len}\r\nConnection: close\r\n\r\n"
        );
        if method == "GET" && status == 200 {
            let _ = out.write_all(&bytes);
        }
    }

    fn requests(&self) -> usize {
        self.log.iter().map(|log| log.lock().unwrap().len()).sum()
    }

    /// vit-cli, to ask these hosts, with a home of its own.
    fn cli(&self, home: &Path) -> Command {
        let mut command = vit_cli();
        for name in
            ["HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME"]
        {
            command.env_remove(name);
        }
        // a proxy of the caller's would see the requests
        for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env("HOME", home).env("HF_ENDPOINT", &self.hub);
        command
    }
}

fn fixture() -> std::path::PathBuf {
    root().join("tests/fixtures/parity/timm/test_vit4")
}

fn pull(command: &mut Command) -> Done {
    finish(command.args(["pull", "owner/model"]))
}

/// The snapshot of a cache holds the repository's files.
fn assert_in(cache: &Path, said: &str) {
    let snapshot = cache.join("models--owner--model/snapshots").join(COMMIT);
    assert_eq!(said.trim(), snapshot.display().to_string());
    for name in ["config.json", "model.safetensors"] {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), fs::read(fixture().join(name)).unwrap(), "{name}");
    }
}

#[test]
fn the_program_sends_its_token_to_the_endpoint_and_to_nobody_else() {
    let (hosts, home) = (Hosts::start(), tempfile::tempdir().unwrap());
    // from the environment; from the file that a login leaves; none
    fs::create_dir_all(home.path().join(".cache/huggingface")).unwrap();
    fs::write(home.path().join(".cache/huggingface/token"), "hf_login\n").unwrap();
    let other = tempfile::tempdir().unwrap();
    for (token, wanted, home) in [
        (Some("hf_secret"), Some("bearer hf_secret"), home.path()),
        (None, Some("bearer hf_login"), home.path()),
        (None, None, other.path()),
    ] {
        hosts.log.iter().for_each(|log| log.lock().unwrap().clear());
        let mut command = hosts.cli(home);
        let cache = tempfile::tempdir().unwrap();
        command.env("HF_HUB_CACHE", cache.path());
        command.envs(token.map(|token| ("HF_TOKEN", token)));
        let done = pull(&mut command);
        assert!(!done.stderr.contains("hf_") && !done.stdout.contains("hf_"), "{done:?}");
        done.good();
        let [hub, cdn] = hosts.log.each_ref().map(|log| log.lock().unwrap().clone());
        let sent = |head: &String| head.lines().find_map(|l| l.strip_prefix("authorization: ").map(str::to_owned));
        assert!(!hub.is_empty() && hub.iter().all(|head| sent(head).as_deref() == wanted), "{hub:?}");
        assert!(!cdn.is_empty() && cdn.iter().all(|head| !head.contains("hf_")), "{cdn:?}");
    }
}

#[test]
fn the_program_keeps_its_cache_where_the_environment_says() {
    let (hosts, home) = (Hosts::start(), tempfile::tempdir().unwrap());
    let place = |name: &str| home.path().join(name);
    let said = pull(hosts.cli(home.path()).env("HF_HUB_CACHE", place("a")).env("HF_HOME", place("b"))).good();
    assert_in(&place("a"), &said);
    assert!(!place("b").exists());
    assert_in(&place("b/hub"), &pull(hosts.cli(home.path()).env("HF_HOME", place("b"))).good());
    assert_in(&place("c/huggingface/hub"), &pull(hosts.cli(home.path()).env("XDG_CACHE_HOME", place("c"))).good());
    assert_in(&place(".cache/huggingface/hub"), &pull(&mut hosts.cli(home.path())).good());

    // a MODEL that is there needs nobody, whatever the endpoint
    let before = hosts.requests();
    let summary = |command: &mut Command| finish(command.args(["summary", "owner/model"]));
    let there = summary(hosts.cli(home.path()).env("HF_ENDPOINT", "http://127.0.0.1:1")).good();
    assert_eq!(hosts.requests(), before);
    // and one that is not is fetched unasked
    assert_eq!(summary(hosts.cli(home.path()).env("HF_HOME", place("d"))).good(), there);
    assert!(hosts.requests() > before && place("d/hub/models--owner--model/refs/main").is_file());
}

#[test]
fn the_program_opens_no_socket_offline_and_says_who_did_not_answer() {
    let (hosts, home) = (Hosts::start(), tempfile::tempdir().unwrap());
    for (name, value) in [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true"), ("TRANSFORMERS_OFFLINE", "yes")] {
        for args in
            [&["pull", "owner/model"][..], &["summary", "owner/model"], &["predict", "-m", "owner/model", "x.png"]]
        {
            finish(hosts.cli(home.path()).env(name, value).args(args)).bad(2, &["owner/model", "HF_HUB_OFFLINE"]);
        }
    }
    // nor for a model that needs no network
    let sample = root().join("weights/digits/samples/3.png");
    for model in [std::path::PathBuf::from("digits"), root().join("weights/digits/model.onnx")] {
        finish(hosts.cli(home.path()).arg("predict").arg("--model").arg(model).arg(&sample)).good();
    }
    assert_eq!(hosts.requests(), 0);
    pull(hosts.cli(home.path()).env("HF_HUB_OFFLINE", "0")).good();
    assert!(hosts.requests() > 0);
    // what was fetched is used offline
    finish(hosts.cli(home.path()).env("HF_HUB_OFFLINE", "1").args(["summary", "owner/model"])).good();

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // closed again here
    let other = tempfile::tempdir().unwrap();
    pull(hosts.cli(other.path()).env("HF_ENDPOINT", format!("http://{free}"))).bad(2, &[&free.to_string()]);
    pull(hosts.cli(other.path()).env("HF_ENDPOINT", "no url")).bad(2, &["no url"]);
    assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0, "a refusal leaves something behind");
}
