//! `serve`: models behind HTTP, for the clients that people already have.
//!
//! From below: `fault` is an answer that says no, `picture` is what clients send, `fetch` gets it from a URL, `metrics` counts,
//! `batch` runs requests together, `models` holds what is loaded, `state` is shared by every request, `call` is a request,
//! `routes` speaks each client's language, and `listen` accepts connections until it is told to stop.

mod batch;
mod call;
mod fault;
mod fetch;
mod listen;
mod metrics;
mod models;
mod openapi;
mod picture;
mod routes;
mod state;

use std::sync::Arc;

use anyhow::Context as _;

use crate::args::ServeArgs;
use crate::complain;

/// Loads the models, then answers until SIGTERM or Ctrl-C.
pub fn run(args: &ServeArgs, verbose: bool) -> anyhow::Result<()> {
    // a port that is taken is said before minutes of loading
    let address = format!("{}:{}", args.hostname, args.port);
    let listener = std::net::TcpListener::bind(&address).with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    let state = Arc::new(state::State::new(args, verbose)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(state.threads.saturating_mul(2).max(4))
        .enable_all()
        .build()?;
    let local = listener.local_addr()?;
    complain(&format!("{} at http://{local}", state.models.names().join(", ")));
    runtime.block_on(listen::serve(listener, state, args))
}
