//! The README and the guide: every command in them runs, every link leads somewhere.
//!
//! A block of ```` ```console ```` is run line by line unless the line above it is a comment `<!-- not run: WHY -->`. A line that
//! begins with `$ ` is a command; the lines after it are its output, in which `…` matches any number of lines. A command
//! without such lines only has to succeed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::root;

/// README.md and the pages of the guide.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> = std::fs::read_dir(root().join("docs/src"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    pages.push(root().join("README.md"));
    pages.sort();
    pages
}

/// A command, and the lines that it should print (none: any).
struct Step {
    command: String,
    printed: Vec<String>,
}

/// The blocks of a page that are to be run.
fn blocks(text: &str) -> Vec<Vec<Step>> {
    let mut blocks = Vec::new();
    let (mut above, mut lines) = ("", text.lines());
    while let Some(line) = lines.next() {
        if line.starts_with("```console") {
            let body: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            if !above.starts_with("<!-- not run: ") {
                blocks.push(steps(&body));
            }
        }
        above = line;
    }
    blocks
}

fn steps(body: &[&str]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in body {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => steps.push(Step { command: command.into(), printed: Vec::new() }),
            (None, Some(step)) => step.printed.push((*line).into()),
            (None, None) => panic!("a block begins with output: {line}"),
        }
    }
    steps
}

/// Whether `lines` are as `expected` says.
fn matches(expected: &[String], lines: &[&str]) -> bool {
    match expected.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first == "…" => (0..=lines.len()).any(|skipped| matches(rest, &lines[skipped..])),
        Some((first, rest)) => lines.first().is_some_and(|line| alike(first, line)) && matches(rest, &lines[1..]),
    }
}

/// Whether two lines are the same but for the last digits of numbers, which differ between kernels: by 0.1 % at most, and
/// differences (below 1e-4) by anything.
fn alike(expected: &str, line: &str) -> bool {
    let words = |text: &str| text.split([' ', ',']).map(str::to_owned).collect::<Vec<_>>();
    let same = |(a, b): (&String, &String)| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) => (a - b).abs() <= 1e-3 * a.abs() || (a < 1e-4 && b < 1e-4),
        _ => a == b,
    };
    let (expected, line) = (words(expected), words(line));
    expected.len() == line.len() && expected.iter().zip(&line).all(same)
}

/// A folder with the repository's weights in it.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let samples = folder.path().join("weights/digits/samples");
    std::fs::create_dir_all(&samples).unwrap();
    for file in ["model.onnx", "model.safetensors", "labels.txt", "samples.csv"] {
        std::fs::copy(root().join("weights/digits").join(file), folder.path().join("weights/digits").join(file))
            .unwrap();
    }
    for digit in 0..10 {
        let name = format!("{digit}.png");
        std::fs::copy(root().join("weights/digits/samples").join(&name), samples.join(&name)).unwrap();
    }
    folder
}

#[cfg(unix)]
#[test]
fn every_command_of_the_guide_runs() {
    let programs = Path::new(env!("CARGO_BIN_EXE_vit-cli")).parent().unwrap();
    // cargo builds the programs of the package under test alone; with `--workspace` the converter is beside this one
    let converts = programs.join(format!("vit-convert{}", std::env::consts::EXE_SUFFIX)).is_file();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let (mut ran, mut left) = (0, 0);
    for page in pages() {
        let folder = workplace();
        let mut blocks = blocks(&std::fs::read_to_string(&page).unwrap());
        if !converts {
            let all = blocks.len();
            blocks.retain(|block| !block.iter().any(|step| step.command.starts_with("vit-convert")));
            left += all - blocks.len();
        }
        for step in blocks.into_iter().flatten() {
            let at = format!("{}: {}", page.display(), step.command);
            let output = Command::new("sh")
                .args(["-c", &step.command])
                .current_dir(folder.path())
                .env("PATH", &path)
                .env("HF_HUB_OFFLINE", "1")
                .env("NO_COLOR", "1")
                .env_remove("VIT_MODEL")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let mut printed = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{at}\n{printed}");
            printed.insert_str(0, &String::from_utf8(output.stdout).unwrap());
            let lines: Vec<_> = printed.lines().map(str::trim_end).collect();
            assert!(step.printed.is_empty() || matches(&step.printed, &lines), "{at}\nprinted\n{printed}");
            ran += 1;
        }
    }
    assert!(ran >= 10, "{ran} commands ran");
    if left > 0 {
        eprintln!("{left} blocks with vit-convert were left out: build the whole workspace to run them, too");
    }
}

#[test]
fn every_link_between_pages_leads_to_a_file() {
    let mut found = 0;
    for page in
        pages().into_iter().chain(["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"].map(|name| root().join(name)))
    {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            assert!(page.parent().unwrap().join(file).exists(), "{}: {link}", page.display());
            found += 1;
        }
    }
    assert!(found > 20, "{found} links");
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let summary = std::fs::read_to_string(root().join("docs/src/SUMMARY.md")).unwrap();
    for page in pages().iter().filter(|page| page.starts_with(root().join("docs"))) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "{name} is not in SUMMARY.md");
    }
}

#[test]
fn the_readme_shows_the_program_that_is_built() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let program = std::fs::read_to_string(root().join("tools/depend/defaults/classify.rs")).unwrap();
    let (_, code) = program.split_once('\n').unwrap(); // without the comment that names the README
    assert!(readme.contains(&format!("```rust\n{code}```")), "README.md and tools/depend/defaults/classify.rs differ");
}
