//! How the program behaves as a process: exit status, pipes, signals, a full disk.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{finish, root, run, vit_cli};

#[test]
fn usage_errors_exit_with_2_and_help_with_0() {
    run::<&str>([]).bad(2, &["Usage"]);
    run(["predict"]).bad(2, &["FILES"]);
    run(["predict", "--nonsense", "x"]).bad(2, &["--nonsense"]);
    run(["predict", "--batch", "0", "x"]).bad(2, &["--batch"]);
    let hostile = run(["predict", "--a\u{1b}[31m", "x"]).bad(2, &[]);
    assert!(!hostile.stderr.contains('\u{1b}'), "{hostile:?}");
    assert!(run(["--help"]).good().contains("model.safetensors"));
    assert!(run(["--version"]).good().starts_with("vit-cli "));
    let commands = "predict embed explain forward preprocess summary inspect compare bench completions";
    for command in commands.split(' ') {
        let help = run([command, "--help"]).good();
        assert!(help.contains("Usage: vit-cli"), "{help}");
    }
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(run(["completions", shell]).good().contains("torchsummary"), "{shell}");
    }
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let samples = vec![root().join("weights/digits/samples"); 40];
    let mut child = vit_cli()
        .args(["predict", "-k10"])
        .args(samples)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let done = crate::support::Done::from(child.wait_with_output().unwrap());
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let sample = root().join("weights/digits/samples/0.png");
    finish(vit_cli().arg("predict").arg(&sample).stdout(full())).bad(2, &["standard output"]);
    finish(vit_cli().arg("summary").stdout(full())).bad(2, &["standard output"]);
    finish(vit_cli().arg("--help").stdout(full())).bad(2, &["standard output"]);
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_within_two_seconds() {
    let samples = vec![root().join("weights/digits/samples"); 20_000];
    let mut child =
        vit_cli().arg("predict").args(samples).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // at work once the first answer is there
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    let drain = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let started = Instant::now();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(2));
    drain.join().unwrap().unwrap();
}

#[test]
fn stdout_holds_answers_and_nothing_else() {
    let sample = root().join("weights/digits/samples/0.png");
    let done = finish(vit_cli().args(["--verbose", "predict", "-f", "jsonl"]).arg(&sample));
    assert!(done.stderr.contains("digits runs on"), "{done:?}");
    assert_eq!(done.good().lines().count(), 1);
}
