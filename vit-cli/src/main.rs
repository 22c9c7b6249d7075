//! `vit-cli`: parses, runs one subcommand, and turns what happened into an exit status.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod draw;
mod model;
mod modules;
mod open;
mod output;
mod save;
#[cfg(feature = "serve")]
mod serve;
mod sheet;
mod sources;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use args::{Cli, Command};
use clap::{CommandFactory as _, Parser as _};
use commands::{bench, compare, doctor, embed, eval, explain, forward, inspect, predict, preprocess, similar, summary};
#[cfg(feature = "hub")]
use commands::{models, pull};
use output::ReaderGone;
use vit_convert::process;
use vit_model::inputs;

/// Whether everything that was asked for was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything.
    Good,
    /// Some inputs failed, or a comparison did not hold; what, has been said.
    Failed,
}

fn main() -> ExitCode {
    process::with_stack(program)
}

fn program() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    // a server ends when it has answered what it accepted
    #[cfg(feature = "serve")]
    let waits = matches!(cli.command, Command::Serve(_));
    #[cfg(not(feature = "serve"))]
    let waits = false;
    if !waits {
        vit_convert::signals::guard();
    }
    match run(&cli) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::from(1),
        Err(error) if error.chain().any(<dyn std::error::Error>::is::<ReaderGone>) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("error: {error:#}"));
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Outcome> {
    let verbose = cli.verbose;
    inputs::protect();
    let threads = match &cli.command {
        Command::Predict(args) => args.run.threads,
        Command::Embed(args) => args.run.threads,
        Command::Explain(args) => args.run.threads,
        Command::Forward(args) => args.run.threads,
        Command::Similar(args) => args.run.threads,
        Command::Eval(args) => args.run.threads,
        Command::Compare(args) => args.run.threads,
        Command::Bench(args) => args.run.threads,
        #[cfg(feature = "serve")]
        Command::Serve(args) => args.run.threads,
        _ => None,
    };
    // an imported model, candle's modules and the reading of images use them
    if !matches!(cli.command, Command::Completions(_) | Command::Man(_)) {
        process::start_threads(threads.map(usize::from));
    }
    model::say(&cli.open);
    let done = match &cli.command {
        Command::Predict(args) => return predict::run(args, verbose),
        Command::Embed(args) => return embed::run(args, verbose),
        Command::Similar(args) => similar::run(args, verbose),
        Command::Eval(args) => return eval::run(args, verbose),
        Command::Compare(args) => return compare::run(args, verbose),
        Command::Explain(args) => explain::run(args, verbose),
        Command::Forward(args) => forward::run(args, verbose),
        Command::Preprocess(args) => preprocess::run(args),
        Command::Summary(args) => summary::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bench(args) => bench::run(args, verbose),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(args, verbose),
        #[cfg(feature = "hub")]
        Command::Models(args) => models::run(args),
        #[cfg(feature = "hub")]
        Command::Pull(args) => pull::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "vit-cli", &mut script);
            let mut out = output::Stdout::new();
            out.write(&String::from_utf8_lossy(&script))?;
            out.flush()
        }
        Command::Man(args) => std::fs::create_dir_all(&args.folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &args.folder))
            .with_context(|| output::show(&args.folder)),
    };
    done.map(|()| Outcome::Good)
}

/// Help and version go to stdout, complaints about the command line to stderr.
fn usage(error: &clap::Error) -> ExitCode {
    let hostile = std::env::args_os().any(|arg| arg.as_encoded_bytes().iter().any(u8::is_ascii_control));
    let printed = if error.use_stderr() && hostile {
        complain(&error.to_string());
        Ok(())
    } else {
        error.print()
    };
    match printed {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("error: standard output: {e}"));
            ExitCode::from(2)
        }
        Ok(()) if error.use_stderr() => ExitCode::from(2),
        Ok(()) => ExitCode::SUCCESS,
    }
}

/// One line on stderr. That nobody reads stderr is no reason to fail.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "vit-cli: {}", output::message(text));
}
