//! Tests with a small local server in place of the Hub that can also violate the protocol. They check the results and the
//! contents of the cache.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use candle_core::{Device, safetensors};
use sha2::{Digest, Sha256};

use super::{Hub, HubOptions, RepoId, snapshot};
use crate::checkpoint;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

type Files = BTreeMap<String, Vec<u8>>;

/// How the servers misbehave.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// The Hub answers every request with a status and a header.
    Hub(u16, &'static str),
    /// The Hub sends this ETag for the weights.
    Etag(&'static str),
    /// The host that sends the weights answers with this status.
    Cdn(u16),
    /// Every request for the weights gets half of them.
    Short,
    /// The first request for the weights gets half of them.
    CutOnce,
    WrongBytes,
    TooMuch,
    /// The weights arrive one byte at a time, with pauses.
    Slow,
    /// The Hub redirects to itself forever.
    Circle,
}

struct Request {
    head: String,
    path: String,
    range: Option<usize>,
    has_token: bool,
}

/// A repository on two hosts: the Hub, and the host that it redirects to for weights.
struct Site {
    files: Mutex<Files>,
    fault: Mutex<Fault>,
    hub: Mutex<Vec<Request>>,
    cdn: Mutex<Vec<Request>>,
    cdn_at: String,
    cache: tempfile::TempDir,
    endpoint: String,
}

impl Site {
    fn new(files: Files) -> Arc<Self> {
        let (hub, cdn) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let at = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let site = Arc::new(Self {
            files: Mutex::new(files),
            fault: Mutex::new(Fault::None),
            hub: Mutex::default(),
            cdn: Mutex::default(),
            cdn_at: at(&cdn),
            cache: tempfile::tempdir().unwrap(),
            endpoint: at(&hub),
        });
        serve(hub, Arc::clone(&site), Site::answer_as_hub);
        serve(cdn, Arc::clone(&site), Site::answer_as_cdn);
        site
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: self.endpoint.clone(),
            cache: self.cache.path().join("hub"),
            token: Some("hf_secret".into()),
            offline: false,
            patience: Duration::from_secs(4),
        }
    }

    fn online(&self) -> Hub {
        Hub::new(self.options()).unwrap()
    }

    fn offline(&self) -> Hub {
        Hub::new(HubOptions { offline: true, ..self.options() }).unwrap()
    }

    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// The error that `get` returns with a fault.
    fn refusal(&self, fault: Fault) -> String {
        self.set(fault);
        self.online().get(&id(), &mut ()).unwrap_err().to_string()
    }

    fn requests(&self) -> usize {
        self.hub.lock().unwrap().len() + self.cdn.lock().unwrap().len()
    }

    /// The files in the cache except for locks, as paths relative to the repository's folder.
    fn cached(&self) -> Vec<String> {
        let folder = self.cache.path().join("hub").join("models--owner--model");
        let (mut found, mut folders) = (Vec::new(), vec![folder.clone()]);
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                } else {
                    found.push(entry.path().strip_prefix(&folder).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        found
    }

    /// Checks that the cache has no blob of the weights and no partial file, and that no revision points to an incomplete
    /// snapshot.
    fn assert_no_weights(&self, fault: Fault) {
        let blob = sha256(&self.files.lock().unwrap()[WEIGHTS]);
        let bad =
            |f: &String| f.contains(&blob) || f.ends_with(".incomplete") || f.contains(".tmp") || f.starts_with("refs");
        let left: Vec<String> = self.cached().into_iter().filter(bad).collect();
        assert!(left.is_empty(), "{fault:?} left {left:?}");
        assert!(self.offline().get(&id(), &mut ()).is_err(), "{fault:?}");
    }

    fn answer_as_hub(&self, request: &Request, out: &mut TcpStream) {
        let fault = *self.fault.lock().unwrap();
        if let Fault::Hub(status, header) = fault {
            return head(out, status, &[header.into(), "Content-Length: 0".into()]);
        }
        if fault == Fault::Circle {
            return head(out, 307, &[format!("Location: {}", request.path), "Content-Length: 0".into()]);
        }
        let name = request.path.rsplit('/').next().unwrap();
        let files = self.files.lock().unwrap().clone();
        let Some(bytes) = files.get(name).filter(|_| request.path.starts_with("/owner/model/resolve/")) else {
            return head(out, 404, &["X-Error-Code: EntryNotFound".into(), "Content-Length: 0".into()]);
        };
        let mut headers = vec![format!("X-Repo-Commit: {COMMIT}")];
        if name.ends_with(".safetensors") {
            let etag = if let Fault::Etag(etag) = fault { etag.into() } else { sha256(bytes) };
            headers.push(format!("X-Linked-Etag: \"{etag}\""));
            headers.push(format!("X-Linked-Size: {}", bytes.len()));
            headers.push(format!("Location: {}/{name}", self.cdn_at));
            headers.push("Content-Length: 0".into());
            return head(out, 302, &headers);
        }
        headers.push(format!("ETag: \"{}\"", &sha256(bytes)[..40]));
        headers.push(format!("Content-Length: {}", bytes.len()));
        head(out, 200, &headers);
        if request.head.starts_with("GET") {
            let _ = out.write_all(bytes);
        }
    }

    fn answer_as_cdn(&self, request: &Request, out: &mut TcpStream) {
        let fault = *self.fault.lock().unwrap();
        let mut bytes = self.files.lock().unwrap()[request.path.trim_start_matches('/')].clone();
        let size = bytes.len();
        match fault {
            Fault::Cdn(status) => return head(out, status, &["Content-Length: 0".into()]),
            Fault::WrongBytes => bytes[size / 2] ^= 1,
            Fault::TooMuch => bytes.push(0),
            _ => {}
        }
        let from = request.range.unwrap_or(0);
        let mut headers = vec![format!("Content-Length: {}", bytes.len() - from)];
        if from > 0 {
            headers.push(format!("Content-Range: bytes {from}-{}/{}", size - 1, bytes.len()));
        }
        head(out, if from > 0 { 206 } else { 200 }, &headers);
        let first = self.cdn.lock().unwrap().len() == 1;
        match fault {
            Fault::Short => bytes.truncate(from.max(size / 2)),
            Fault::CutOnce if first => bytes.truncate(size / 2),
            Fault::Slow => {
                for byte in &bytes[from..] {
                    if out.write_all(&[*byte]).is_err() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(100));
                }
                return;
            }
            _ => {}
        }
        let _ = out.write_all(&bytes[from..]);
    }
}

fn head(out: &mut TcpStream, status: u16, headers: &[String]) {
    let headers: String = headers.iter().filter(|h| !h.is_empty()).map(|h| format!("{h}\r\n")).collect();
    let _ = write!(out, "HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
}

fn serve(listener: TcpListener, site: Arc<Site>, answer: fn(&Site, &Request, &mut TcpStream)) {
    let is_cdn = format!("http://{}", listener.local_addr().unwrap()) == site.cdn_at;
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (site, mut stream) = (Arc::clone(&site), stream.unwrap());
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let first = lines.next().and_then(Result::ok).unwrap_or_default();
                let rest = lines.map_while(Result::ok).take_while(|line| !line.is_empty());
                let text = rest.fold(first, |all, line| all + "\n" + &line.to_lowercase());
                let range = text.lines().find_map(|l| l.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok());
                let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
                let request = || Request {
                    path: path.clone(),
                    range,
                    has_token: text.contains("authorization: bearer hf_secret"),
                    head: text.clone(),
                };
                let log = if is_cdn { &site.cdn } else { &site.hub };
                log.lock().unwrap().push(request());
                answer(&site, &request(), &mut stream);
            });
        }
    });
}

fn id() -> RepoId {
    "owner/model".parse().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    snapshot::hex(hash)
}

/// A folder of the fixtures as a repository.
fn files(fixture: &str) -> Files {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(fixture);
    let names = ["config.json", "preprocessor_config.json", WEIGHTS];
    names.iter().filter_map(|n| Some(((*n).to_owned(), fs::read(folder.join(n)).ok()?))).collect()
}

fn timm() -> Files {
    files("timm/test_vit4")
}

/// The same weights in two files with an index.
fn sharded(mut files: Files) -> Files {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join(WEIGHTS);
    fs::write(&whole, files.remove(WEIGHTS).unwrap()).unwrap();
    let mut tensors: Vec<_> = safetensors::load(&whole, &Device::Cpu).unwrap().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", i + 1);
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.as_str().into())));
        let part: HashMap<_, _> = part.iter().cloned().collect();
        safetensors::save(&part, folder.path().join(&name)).unwrap();
        files.insert(name.clone(), fs::read(folder.path().join(&name)).unwrap());
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    files
}

#[test]
fn every_layout_is_fetched_once_and_loads() {
    for files in [timm(), files("hf/vit_cls"), files("hf/dinov2_cls"), sharded(timm()), sharded(files("hf/vit_cls"))] {
        let site = Site::new(files.clone());
        let folder = site.online().get(&id(), &mut ()).unwrap();
        let checkpoint = checkpoint::open(&folder).unwrap();
        assert!(!checkpoint.weights.tensors().is_empty());
        for (name, bytes) in &files {
            assert_eq!(fs::read(folder.join(name)).unwrap(), *bytes, "{name}");
        }

        // the layout of Python's cache
        let repo = site.cache.path().join("hub/models--owner--model");
        assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
        assert_eq!(folder, repo.join("snapshots").join(COMMIT));
        let leftover = |f: &String| f.ends_with(".incomplete") || f.contains(".tmp");
        assert!(!site.cached().iter().any(leftover), "{:?}", site.cached());

        // the second time, no request is sent
        let before = site.requests();
        assert_eq!(site.online().get(&id(), &mut ()).unwrap(), folder);
        assert_eq!(site.offline().get(&id(), &mut ()).unwrap(), folder);
        assert_eq!(site.requests(), before);
        let list = site.offline().list();
        assert_eq!(list.len(), 1);
        assert_eq!((&list[0].id, &list[0].folder), (&id(), &folder));
    }
}

/// A model with two towers, and a text tower alone, come with what their tokenisers are made of.
#[test]
fn text_towers_come_with_their_tokenizers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/two_tower");
    for (name, wanted) in [
        ("clip", &["merges.txt", "tokenizer_config.json", "vocab.json"][..]),
        ("siglip", &["tokenizer.json", "tokenizer_config.json"]),
        ("texts", &["merges.txt", "tokenizer_config.json", "vocab.json"]),
    ] {
        let read = |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
        let site = Site::new(fs::read_dir(folder.join(name)).unwrap().map(|entry| read(entry.unwrap())).collect());
        let snapshot = site.online().get(&id(), &mut ()).unwrap();
        let text = checkpoint::TextSource::open(&snapshot).unwrap().load(&Device::Cpu).unwrap();
        assert_eq!(text.embed(&["a cat"]).unwrap().len(), 1);
        let found: Vec<String> = site.cached().into_iter().filter(|f| f.starts_with("snapshots")).collect();
        for file in wanted {
            assert!(found.iter().any(|f| f.ends_with(&format!("/{file}"))), "{name}: {file} in {found:?}");
        }
        assert!(!found.iter().any(|f| f.ends_with("texts.json")), "{name}");
        let before = site.requests();
        assert_eq!(site.online().get(&id(), &mut ()).unwrap(), snapshot);
        assert_eq!(site.requests(), before, "{name}: what is in the cache is not asked for again");
    }
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let site = Site::new(timm());
    site.online().get(&id(), &mut ()).unwrap();
    let (hub, cdn) = (site.hub.lock().unwrap(), site.cdn.lock().unwrap());
    assert!(!hub.is_empty() && hub.iter().all(|r| r.has_token));
    assert!(!cdn.is_empty() && cdn.iter().all(|r| !r.head.contains("hf_secret")));
    assert!(!format!("{:?}", site.options()).contains("hf_secret"));
}

#[test]
fn a_refusal_names_url_and_status_and_leaves_nothing() {
    let site = Site::new(timm());
    let cases = [
        (401, "", "private"),
        (403, "", "terms"),
        (404, "X-Error-Code: RepoNotFound", "no such repository"),
        (404, "X-Error-Code: RevisionNotFound", "no such branch"),
        (404, "", "has no config.json"),
        (429, "Retry-After: 3600", "3600 seconds"),
        (503, "", "try again later"),
    ];
    for (status, header, advice) in cases {
        let error = site.refusal(Fault::Hub(status, header));
        let named = error.contains(&site.endpoint) && error.contains(&status.to_string());
        assert!(named && error.contains(advice), "{status} {header}: {error}");
        assert!(!error.contains("hf_secret"));
        assert_eq!(site.cached(), Vec::<String>::new(), "{status} {header}");
    }
    let error = site.refusal(Fault::Circle);
    assert!(error.contains("redirects"), "{error}");
    assert_eq!(site.cached(), Vec::<String>::new());

    site.set(Fault::None);
    site.online().get(&id(), &mut ()).unwrap();
}

#[test]
fn weights_that_do_not_come_whole_do_not_come_at_all() {
    let faults = [
        (Fault::Cdn(404), "404"),
        (Fault::Cdn(403), "403"),
        (Fault::Cdn(503), "503"),
        (Fault::Short, "bytes"),
        (Fault::WrongBytes, "SHA-256"),
        (Fault::TooMuch, "bytes"),
        (Fault::Slow, "1 kB a second"),
        (Fault::Etag("../../x"), "cannot name a file"),
        (Fault::Etag(""), "cannot name a file"),
    ];
    for (fault, why) in faults {
        let site = Site::new(timm());
        let error = site.refusal(fault);
        assert!(error.contains(why) && error.contains("http://127.0.0.1:"), "{fault:?}: {error}");
        site.assert_no_weights(fault);

        site.set(Fault::None);
        checkpoint::open(&site.online().get(&id(), &mut ()).unwrap()).unwrap();
    }
}

#[test]
fn a_download_that_was_cut_is_taken_up_where_it_was() {
    // within one run
    let site = Site::new(timm());
    site.set(Fault::CutOnce);
    site.online().get(&id(), &mut ()).unwrap();
    let half = timm()[WEIGHTS].len() / 2;
    let ranges: Vec<Option<usize>> = site.cdn.lock().unwrap().iter().map(|r| r.range).collect();
    assert_eq!(ranges, [None, Some(half)]);

    // in a later run, which keeps what an earlier one left if it is right and discards it if it is wrong
    for (byte, ok) in [(0, true), (1, false)] {
        let site = Site::new(timm());
        let weights = &timm()[WEIGHTS];
        let blobs = site.cache.path().join("hub/models--owner--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let mut part = weights[..half].to_vec();
        part[half / 2] ^= byte;
        fs::write(blobs.join(format!("{}.incomplete", sha256(weights))), part).unwrap();
        assert_eq!(site.online().get(&id(), &mut ()).is_ok(), ok);
        assert_eq!(site.cdn.lock().unwrap()[0].range, Some(half));
        if !ok {
            site.assert_no_weights(Fault::None);
        }
        site.online().get(&id(), &mut ()).unwrap();
    }
}

#[test]
fn a_damaged_blob_is_an_error_offline_and_fetched_again_online() {
    let site = Site::new(timm());
    let folder = site.online().get(&id(), &mut ()).unwrap();
    let blob = folder.join(WEIGHTS).canonicalize().unwrap();
    let whole = fs::read(&blob).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for damaged in [&whole[..whole.len() / 2], &[], &flipped] {
        fs::write(&blob, damaged).unwrap();
        let error = site.offline().get(&id(), &mut ()).unwrap_err().to_string();
        assert!(error.contains("damaged in the cache") && error.contains(WEIGHTS), "{error}");
        site.online().get(&id(), &mut ()).unwrap();
        assert_eq!(fs::read(&blob).unwrap(), whole);
    }
}

#[test]
fn offline_opens_no_socket_and_says_how_to_fetch() {
    let site = Site::new(timm());
    let error = site.offline().get(&id(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("owner/model"), "{error}");
    assert!(site.offline().pull(&id(), &mut ()).is_err());
    assert_eq!(site.requests(), 0);
    assert_eq!(site.cached(), Vec::<String>::new());
}

#[test]
fn nobody_at_the_endpoint_is_told_at_once() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // the listener is dropped here
    let site = Site::new(timm());
    let hub = Hub::new(HubOptions { endpoint: format!("http://{free}"), ..site.options() }).unwrap();
    let error = hub.get(&id(), &mut ()).unwrap_err().to_string();
    assert!(error.contains(&free.to_string()), "{error}");
}

#[test]
fn an_id_is_owner_name_and_revision() {
    let id: RepoId = "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k@refs/pr/1".parse().unwrap();
    assert_eq!((id.name(), id.revision()), ("timm/vit_tiny_patch16_224.augreg_in21k", "refs/pr/1"));
    assert_eq!("a/b".parse::<RepoId>().unwrap().revision(), "main");
    for bad in ["", "a", "a/", "/a", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a/b@/x", "a/b c", "a/b?x", "a--x/b"]
    {
        assert!(bad.parse::<RepoId>().is_err(), "{bad}");
    }
}
