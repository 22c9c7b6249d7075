//! What a program that writes files does about signals.

/// To be called once when a program starts: a signal that ends the program removes what is being written first, and a file
/// that outgrows the limit on its size is an error of that file.
pub fn guard() {
    // a second handler cannot be installed, and without one the system's default still ends the program
    let _ = ctrlc::set_handler(|| {
        let _held = vit_model::checkpoint::atomic::abandon();
        std::process::exit(130);
    });
    // with a handler for this signal, the write itself fails and says why
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
}
