//! `vit-cli serve` on the loopback, as a client sees it: answers, refusals, and how it ends.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::{root, run, vit_cli};

/// A server on a free port, which is ended with the test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let mut command = vit_cli();
        command.args(["serve", "--port", "0", "--threads", "1"]).args(args).env_remove("VIT_API_KEY");
        let mut process = command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit("http://").next().unwrap().to_owned();
        Self { process, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request and reads the whole answer: its status, its headers, its body.
    fn ask(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = self.connect();
        let length = body.len();
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n");
        for header in headers {
            head += &format!("{header}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes()).unwrap();
        // a server that refuses early may close before it has read everything
        let _ = stream.write_all(body);
        read(&mut stream)
    }

    /// Posts; the answer is JSON.
    fn json(&self, path: &str, headers: &[&str], body: &[u8]) -> (u16, Value) {
        let (status, _, body) = self.ask("POST", path, headers, body);
        (status, serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&body))))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read(stream: &mut TcpStream) -> (u16, String, Vec<u8>) {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no headers in {answer:?}"));
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, answer[end + 4..].to_vec())
}

fn sample(digit: usize) -> PathBuf {
    root().join(format!("weights/digits/samples/{digit}.png"))
}

fn picture(digit: usize) -> Vec<u8> {
    std::fs::read(sample(digit)).unwrap()
}

fn form(pictures: &[&[u8]]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (i, picture) in pictures.iter().enumerate() {
        let head = format!("--B\r\nContent-Disposition: form-data; name=\"image\"; filename=\"{i}.png\"\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(picture);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--B--\r\n");
    ("Content-Type: multipart/form-data; boundary=B".into(), body)
}

#[test]
fn answers_are_the_command_lines() {
    let server = Server::start(&[]);
    let expected = |command, digit| -> Value {
        let answer = run([command, "--threads", "1", "--format", "jsonl", sample(digit).to_str().unwrap()]).good();
        serde_json::from_str(&answer).unwrap()
    };
    let (status, answer) = server.json("/predict", &["Content-Type: image/png"], &picture(3));
    assert_eq!((status, &answer["results"][0]["predictions"]), (200, &expected("predict", 3)["predictions"]));
    // to the bit, although the three ran as one batch, and the one that is no picture fails alone
    let (header, body) = form(&[&picture(7), b"no picture", &picture(0)]);
    let (status, answer) = server.json("/embed", &[&header], &body);
    assert_eq!(status, 200);
    assert_eq!(answer["results"][0]["embedding"], expected("embed", 7)["embedding"]);
    assert!(answer["results"][1]["error"].as_str().unwrap().contains("not a PNG"));
    assert_eq!(answer["results"][2]["embedding"], expected("embed", 0)["embedding"]);
    let (_, answer) = server.json("/explain", &[], &picture(3));
    assert_eq!((&answer["grid"], answer["blocks"].as_array().unwrap().len()), (&serde_json::json!([8, 8]), 4));
    assert_eq!(answer["rollout"].as_array().unwrap().len(), 64);
}

#[test]
fn refusals_say_what_is_wrong() {
    let server = Server::start(&["--payload-limit", "20000", "--max-client-batch-size", "2", "--api-key", "secret"]);
    let key = "Authorization: Bearer secret";
    let huge = vec![0; 20_001];
    let (many_header, many) = form(&[&picture(0), &picture(1), &picture(2)]);
    let cases: [(_, Vec<&str>, &[u8], u16, &str); 10] = [
        ("/predict", vec![key], b"hello, this is text", 422, "it looks like text"),
        ("/predict", vec![key], b"", 400, "no picture"),
        ("/predict?top_k=0", vec![key], b"x", 400, "top_k"),
        ("/predict?model=other", vec![key], b"x", 404, "`digits`"),
        ("/predict", vec![key], &huge, 413, "--payload-limit"),
        ("/predict", vec![key, &many_header], &many, 413, "--max-client-batch-size"),
        ("/predict", vec![key, "Content-Type: application/json"], b"{\"image\": 7}", 422, "base64"),
        (
            "/predict",
            vec![key, "Content-Type: application/json"],
            b"{\"image\": \"http://127.0.0.1/\"}",
            422,
            "--allow-url",
        ),
        ("/predict", vec![], b"x", 401, "Authorization: Bearer"),
        ("/predict", vec!["Authorization: Bearer secre"], b"x", 401, "Authorization: Bearer"),
    ];
    for (path, headers, body, status, why) in cases {
        let (found, answer) = server.json(path, &headers, body);
        let said = answer["error"].as_str().unwrap();
        assert!(found == status && said.contains(why), "{path}: {found} {said}");
    }
    assert_eq!(server.ask("GET", "/health", &[], b"").0, 200);
    assert_eq!(server.ask("GET", "/predict", &[key], b"").0, 405);
    let (status, head, page) = server.ask("GET", "/", &[], b"");
    assert!(status == 200 && head.contains("content-security-policy") && page.starts_with(b"<!doctype html>"));
}

#[test]
fn private_addresses_are_not_fetched() {
    let server = Server::start(&["--allow-url"]);
    for url in
        ["http://127.0.0.1:1/a.png", "http://localhost/a.png", "http://[::1]/a.png", "http://169.254.169.254/latest"]
    {
        let body = format!("{{\"image\": \"{url}\"}}");
        let (status, answer) = server.json("/predict", &["Content-Type: application/json"], body.as_bytes());
        let why = answer["error"].as_str().unwrap();
        assert!(status == 422 && why.contains("private"), "{url}: {status} {why}");
    }
}

#[test]
fn slow_clients_keep_nobody_out() {
    let server = Server::start(&["--max-concurrent-requests", "1"]);
    // headers that never end, bodies that never end, and connections that say nothing
    let mut held = Vec::new();
    for i in 0..120 {
        let mut stream = server.connect();
        let _ = match i % 3 {
            0 => stream.write_all(b"POST /predict HTTP/1.1\r\nHost: x\r\nX: "),
            1 => stream.write_all(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"),
            _ => Ok(()),
        };
        held.push(stream);
    }
    assert_eq!(server.json("/predict", &[], &picture(3)).0, 200);
    drop(held);
    assert_eq!(server.json("/predict", &[], &picture(4)).0, 200);
}

#[cfg(unix)]
#[test]
fn sigterm_lets_requests_finish() {
    let mut server = Server::start(&["--grace", "20"]);
    let (body, length) = (picture(5), picture(5).len());
    let mut stream = server.connect();
    let head = format!("POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body[..length - 1]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(Command::new("kill").arg(server.process.id().to_string()).status().unwrap().code(), Some(0));
    std::thread::sleep(Duration::from_millis(300));
    assert!(TcpStream::connect(&server.address).is_err(), "no new connections are accepted");
    stream.write_all(&body[length - 1..]).unwrap();
    let (status, _, answer) = read(&mut stream);
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["results"][0]["predictions"][0]["label"], "5");
    assert_eq!(server.process.wait().unwrap().code(), Some(0));
}
