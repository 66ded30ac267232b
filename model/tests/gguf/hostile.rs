//! Corrupt files give an error: never a panic, and never an allocation larger than the file justifies.

use std::{fs, io::Write as _, path::Path, sync::LazyLock};

use candle_core::quantized::GgmlDType;
use overfill_model::{ModelConfig, Weights, text_files};
use proptest::prelude::*;

use super::{golden, write};

/// A valid file.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    write::parts(&golden("llama-tied", "decode"), GgmlDType::F16).write(file.path());
    fs::read(file.path()).unwrap()
});

/// Reads everything in a file with these bytes.
fn read(bytes: &[u8]) -> Result<(), String> {
    let mut file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    file.write_all(bytes).unwrap();
    let all = |path: &Path| -> Result<(), overfill_model::ModelError> {
        let weights = Weights::open(path)?;
        let config = ModelConfig::from_folder(path)?;
        text_files(path)?;
        weights.fingerprint()?;
        for (name, shape) in config.tensor_shapes() {
            let mut row = vec![0.0; shape[1..].iter().product()];
            weights.read_rows(&name, &shape, 0..1, &mut row)?;
        }
        Ok(())
    };
    all(file.path()).map_err(|e| e.to_string())
}

/// A version 3 header with these counts, followed by `content`.
fn header(tensors: u64, metadata: u64, content: &[u8]) -> Vec<u8> {
    let counts = [tensors.to_le_bytes(), metadata.to_le_bytes()].concat();
    [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &counts, content].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A metadata entry.
fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), kind.to_le_bytes().as_slice(), value].concat()
}

/// A tensor's entry.
fn tensor(shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = [text("t"), (shape.len() as u32).to_le_bytes().to_vec()].concat();
    shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
    [out, kind.to_le_bytes().to_vec(), offset.to_le_bytes().to_vec()].concat()
}

#[test]
fn lies_are_named() {
    assert_eq!(read(&GOOD), Ok(()));
    let huge = u64::MAX.to_le_bytes();
    let array = |kind: u32, count: u64| [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
    let with_architecture = |rest: &[u8], tensors: u64, entries: u64| {
        header(tensors, entries + 1, &[&entry("general.architecture", 8, &text("qwen2")), rest].concat())
    };
    let of_tensor = |entry: Vec<u8>| with_architecture(&entry, 1, 0);
    for (bytes, expected) in [
        (Vec::new(), "the magic number takes 4 bytes, but the file has 0 left"),
        (b"GGML\x03\0\0\0".to_vec(), "it does not begin with GGUF"),
        ([b"GGUF".as_slice(), &1_u32.to_le_bytes()].concat(), "version is 1, supported: 2, 3"),
        // Big-endian.
        ([b"GGUF".as_slice(), &3_u32.to_be_bytes()].concat(), "version is 50331648"),
        (header(0, u64::MAX, b""), "a metadata key takes 8 bytes, but the file has 0 left"),
        (with_architecture(b"", u64::MAX, 0), "a tensor's name takes 8 bytes"),
        (header(0, 1, &huge), "a metadata key takes 18446744073709551615 bytes"),
        (header(0, 1, &entry("k", 8, &huge)), "k takes 18446744073709551615 bytes"),
        (header(0, 1, &entry("k", 13, b"")), "type of k is 13"),
        (header(0, 1, &entry("k", 9, &array(10, u64::MAX))), "k takes 18446744073709551615 bytes"),
        (header(0, 1, &entry("k", 9, &array(0, 1 << 40))), "k takes 1099511627776 bytes, but the file has 0 left"),
        (header(0, 1, &entry("k", 9, &array(8, u64::MAX))), "k takes 8 bytes, but the file has 0 left"),
        (header(0, 1, &entry("k", 9, &array(9, 1))), "type of k is 9"),
        (header(0, 2, &entry("k", 7, &[1]).repeat(2)), "k is there twice"),
        (
            header(0, 1, &entry("general.alignment", 4, &0_u32.to_le_bytes())),
            "general.alignment is 0, supported: a power of two",
        ),
        (header(0, 1, &entry("general.alignment", 4, &33_u32.to_le_bytes())), "general.alignment is 33"),
        (header(0, 1, &entry("general.alignment", 10, &(1_u64 << 63).to_le_bytes())), "general.alignment is"),
        (header(0, 0, b""), "general.architecture is absent"),
        (with_architecture(b"", 0, 0), "qwen2.block_count is absent"),
        (of_tensor(tensor(&[], 0, 0)), "dimensions of t is 0, supported: 1 to 4"),
        (of_tensor(tensor(&[1; 5], 0, 0)), "dimensions of t is 5"),
        (of_tensor(tensor(&[0], 0, 0)), "a size of t is 0"),
        (of_tensor(tensor(&[1 << 40, 1 << 40], 0, 0)), "can't be stored as F32"),
        (of_tensor(tensor(&[u64::MAX], 0, 0)), "can't be stored as F32"),
        (of_tensor(tensor(&[1 << 40], 0, 0)), "tensor t has 4398046511104 bytes at offset 0, outside of the file's"),
        (of_tensor(tensor(&[8], 0, 1 << 40)), "tensor t has 32 bytes at offset 1099511627776, outside"),
        (of_tensor(tensor(&[8], 0, u64::MAX - 31)), "outside of the file's"),
        (of_tensor(tensor(&[8], 0, 7)), "offset of t is 7, supported: multiples of 32"),
        // IQ4_XS.
        (of_tensor(tensor(&[256, 2], 23, 0)), "type of t is 23, supported: 0 (F32), 1 (F16), 2 (Q4_0)"),
        // Quantised blocks that straddle rows, and a quantised vector.
        (of_tensor(tensor(&[48, 2], 8, 0)), "tensor t of shape [2, 48] can't be stored as Q8_0"),
        (of_tensor(tensor(&[64], 8, 0)), "tensor t of shape [64] can't be stored as Q8_0"),
    ] {
        let error = read(&bytes).unwrap_err();
        assert!(error.contains(expected), "{error}\n  has not: {expected}");
    }
}

/// Offset of the tensor data in the valid file. This crate parses everything before it.
static HEADER_BYTES: LazyLock<usize> = LazyLock::new(|| {
    let data: usize = 32;
    let weights = write::parts(&golden("llama-tied", "decode"), GgmlDType::F16);
    let tensors: usize = weights.tensors.iter().map(|(_, t)| t.storage_size_in_bytes().next_multiple_of(data)).sum();
    GOOD.len() - tensors
});

#[test]
fn every_shorter_file_is_an_error() {
    // Truncations near both ends, and a sample of the others.
    for length in (0..*HEADER_BYTES).step_by(97).chain(0..200).chain(GOOD.len() - 100..GOOD.len() - 64) {
        assert!(read(&GOOD[..length]).is_err(), "{length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// A file with overwritten bytes is read or rejected; reading terminates either way.
    #[test]
    fn changed_headers_end(at in 0.0..1.0_f64, bytes in prop::collection::vec(any::<u8>(), 1..9), big in any::<bool>()) {
        let mut file = GOOD.clone();
        let at = ((*HEADER_BYTES - 9) as f64 * at) as usize;
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        if big {
            file[at] = 0xff;
        }
        if let Err(error) = read(&file) {
            prop_assert!(!error.is_empty());
        }
    }
}
