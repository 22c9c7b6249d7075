//! Imports ONNX files and says what was found, or why not: `cargo run --example try_import -- FILE …`

fn main() {
    for path in std::env::args().skip(1) {
        let start = std::time::Instant::now();
        let found = vit_convert::onnx::read(path.as_ref()).and_then(|g| vit_convert::import(&g));
        match found {
            Ok(found) => println!("OK   {path} {:?} {:?}", start.elapsed(), found.config),
            Err(e) => println!("NO   {path} {:?} {e}", start.elapsed()),
        }
    }
}
