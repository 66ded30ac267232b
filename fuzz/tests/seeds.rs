//! Checks that `seeds/` contains the seeds defined in the code. `OVERFILL_WRITE_SEEDS=1` writes them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use overfill_fuzz::{TARGETS, seeds::seeds};

#[test]
fn committed_seeds_are_those_that_are_made() {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for target in &TARGETS {
        let folder = all.join(target.name);
        for (name, bytes) in seeds(target.name) {
            let file = folder.join(&name);
            if std::env::var_os("OVERFILL_WRITE_SEEDS").is_some() {
                fs::create_dir_all(&folder).unwrap();
                fs::write(&file, &bytes).unwrap();
            }
            let written = fs::read(&file).unwrap_or_default();
            assert!(written == bytes, "{} is another: run with OVERFILL_WRITE_SEEDS=1", file.display());
        }
    }
    let mut listed: Vec<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let names = |path: &Path| -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    listed.sort();
    assert_eq!(names(&all), listed, "folders of seeds");
    assert_eq!(names(&all.with_file_name("fuzz_targets")), listed, "binaries for cargo-fuzz");
}
