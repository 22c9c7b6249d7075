//! What a program does about the limits of its process: a small stack, threads that cannot be started.

use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

/// The stack of the main thread that our programs are tested with, in bytes: Linux' default.
const STACK: usize = 8 << 20;

/// Runs a program with a stack of the usual size. The limit of the shell (`ulimit -s`) is for the main thread alone, so the program
/// moves to another thread if that limit is low.
pub fn with_stack<T: Send>(program: impl Fn() -> T + Sync) -> T {
    if stack_limit().is_none_or(|limit| limit >= STACK) {
        return program();
    }
    thread::scope(|scope| match thread::Builder::new().stack_size(STACK).spawn_scoped(scope, &program) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(_) => program(),
    })
}

/// The limit on the main thread's stack, if the system says that there is one.
fn stack_limit() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max stack size"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Starts rayon's global pool, which candle and the reading of images use, with as many threads as the system allows. rayon itself
/// panics if it cannot start all of them. `threads`: one per core if nothing else is said.
pub fn start_threads(threads: Option<usize>) {
    let asked = threads.or_else(|| std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok()).filter(|&n| n > 0);
    let count = asked.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    // the threads are started first, and each waits for its part of the pool
    let workers = Mutex::new(Vec::new());
    let take = |push: Option<mpsc::Sender<rayon::ThreadBuilder>>| {
        let mut workers = workers.lock().unwrap_or_else(PoisonError::into_inner);
        match push {
            Some(worker) => {
                workers.push(worker);
                None
            }
            None => workers.pop(),
        }
    };
    let started = (0..count).map_while(|index| {
        let (send, receive) = mpsc::channel::<rayon::ThreadBuilder>();
        let body = move || {
            if let Ok(builder) = receive.recv() {
                builder.run();
            }
        };
        let thread = thread::Builder::new().name(format!("rayon-{index}")).spawn(body).ok()?;
        take(Some(send));
        Some(thread)
    });
    let count = started.count();
    // a pool exists already if a program calls this twice; then nothing is lost
    let _ = if count == 0 {
        rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global()
    } else {
        let spawn = |builder| {
            let worker = take(None).and_then(|worker| worker.send(builder).ok());
            worker.ok_or_else(|| std::io::Error::other("no thread is left"))
        };
        rayon::ThreadPoolBuilder::new().num_threads(count).spawn_handler(spawn).build_global()
    };
}
