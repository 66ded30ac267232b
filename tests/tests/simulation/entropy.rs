//! Derives all randomness of a simulation from its seed. This includes hash maps, the async runtime and `rand::random`,
//! which all take their seeds from `getrandom`.

// `getrandom` is a C function.
#![allow(unsafe_code)]

use std::{
    cell::RefCell,
    ffi::{c_uint, c_void},
    fs::File,
    io::Read as _,
};

use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};

thread_local! {
    static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// Seeds this thread's randomness. The thread must not have used any randomness before.
pub fn seed_this_thread(seed: u64) {
    SEEDED.with(|seeded| *seeded.borrow_mut() = Some(StdRng::seed_from_u64(seed)));
}

/// Replaces the C library's function of this name, in this test binary only.
///
/// # Safety
/// As for the C function: `buffer` must have room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, _flags: c_uint) -> isize {
    let mut bytes = vec![0; length];
    let seeded = SEEDED.try_with(|seeded| seeded.borrow_mut().as_mut().map(|rng| rng.fill_bytes(&mut bytes)));
    if !matches!(seeded, Ok(Some(()))) && File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).is_err()
    {
        return -1;
    }
    // SAFETY: the caller's buffer has room for `length` bytes and does not overlap with `bytes`.
    unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), length) };
    length as isize
}
