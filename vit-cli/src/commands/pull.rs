//! `pull`, and models given as repositories: downloads them from the Hub, with a progress bar on a terminal.

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use vit_model::hub::{Hub, Progress, RepoId};

use crate::args::PullArgs;
use crate::output::{Stdout, show};

/// Downloads repositories, or the files that have changed, and prints their folders.
pub fn run(args: &PullArgs) -> anyhow::Result<()> {
    let ids = args.models.iter().map(|name| RepoId::named(name)).collect::<Result<Vec<_>, _>>()?;
    let (hub, mut out) = (Hub::from_env()?, Stdout::new());
    for id in &ids {
        out.line(&show(hub.pull(id, &mut Bar(None))?))?;
    }
    out.flush()
}

/// The folder of a repository, which is downloaded if it is not in the cache.
pub fn folder(id: &RepoId) -> anyhow::Result<PathBuf> {
    Ok(Hub::from_env()?.get(id, &mut Bar(None))?)
}

/// A progress bar for the current file. indicatif draws nothing if stderr is not a terminal.
struct Bar(Option<ProgressBar>);

impl Progress for Bar {
    fn start(&mut self, file: &str, total: Option<u64>, done: u64) {
        let bar = total.map_or_else(ProgressBar::no_length, ProgressBar::new);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(show(file));
        bar.set_position(done);
        self.0 = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
