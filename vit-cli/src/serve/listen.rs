//! Accepts connections and keeps them from harming each other, until the server is told to stop.

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use super::routes;
use super::state::State;
use crate::args::ServeArgs;
use crate::complain;

/// How long a client may take to send a request's headers, and a connection may be idle.
const HEADER_PATIENCE: Duration = Duration::from_secs(15);

/// Bytes of a request's headers.
const HEADER_BYTES: usize = 32 << 10;

/// Answers until SIGTERM or Ctrl-C; then lets requests finish.
pub async fn serve(listener: std::net::TcpListener, state: Arc<State>, args: &ServeArgs) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut app = routes::router(state.clone());
    if let Some(origin) = &args.cors {
        let allowed = if origin == "*" { AllowOrigin::from(Any) } else { AllowOrigin::exact(origin.parse()?) };
        app = app.layer(CorsLayer::new().allow_origin(allowed).allow_methods(Any).allow_headers(Any));
    }
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_PATIENCE).max_buf_size(HEADER_BYTES);
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stopped());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let Ok((stream, _)) = accepted else {
            // out of descriptors, most likely: those that are open will be closed
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // an answer that is not large is sent at once
        let _ = stream.set_nodelay(true);
        let (state, service) = (state.clone(), TowerToHyperService::new(app.clone()));
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            state.metrics.connections.inc();
            // a client that breaks the protocol or goes away is no event
            let _ = connection.await;
            state.metrics.connections.dec();
        });
    }
    state.drain();
    drop(listener);
    complain("stopping; requests that were accepted are still answered");
    let grace = Duration::from_secs(args.grace.into());
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        complain(&format!("some requests took longer than {} s (--grace) and were cut off", args.grace));
    }
    Ok(())
}

/// Returns when the process is asked to end.
async fn stopped() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}
