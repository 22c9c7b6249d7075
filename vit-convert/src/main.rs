//! `vit-convert IN OUT`.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    vit_convert::program::main()
}
