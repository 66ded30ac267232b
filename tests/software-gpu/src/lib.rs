//! A software GPU for tests: the real kernels, compiled for the host, behind test doubles of CUDA's libraries.
//!
//! It proves that kernels compute the right values, that host code passes them the right memory, and that streams, events
//! and graphs are ordered. It says nothing about speed. See `cpp/software_gpu.h` for what it can't find.
//!
//! Processes are controlled with environment variables:
//!
//! | variable | meaning |
//! |---|---|
//! | `SOFTWARE_GPU_SEED` | order of threads, blocks and streams (1) |
//! | `SOFTWARE_GPU_MEMORY_BYTES` | device memory (2 GiB) |
//! | `SOFTWARE_GPU_DEVICES` | number of devices (1) |
//! | `SOFTWARE_GPU_ARCHITECTURE` | compute capability times ten (90) |
//! | `SOFTWARE_GPU_DMA_BUF` | 1: device memory can be exported, as a file |
//! | `SOFTWARE_GPU_LAUNCHES_UNTIL_LOST` | the launch with this number fails, and so does every later call |
//! | `SOFTWARE_GPU_NCCL_FAULTS` | faults of NCCL, separated by commas: `join-hangs`, `abort-hangs`, `stuck:N` and `late-failure:N`, in the process's group with number N |

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash, Hasher},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// The kernels' sources.
const KERNELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../model/src/cuda/kernels");
const DOUBLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cpp");
/// Where builds are kept.
const BUILDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/software-gpu");

/// The libraries, and the source that each is made of. All other sources are libcuda's, which comes first because the others
/// use it.
const LIBRARIES: [(&str, Option<&str>); 3] =
    [("libcuda.so", None), ("libcublasLt.so", Some("blaslt.cc")), ("libnccl.so", Some("nccl.cc"))];

const COMPILER: &str = "g++";
/// UBSan finds misaligned loads and indices out of range. A fault ends the process.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-fsanitize=undefined,bounds",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
    "-Wno-subobject-linkage",
];

/// Why a software GPU could not be built or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The compiler is not installed.
    #[error("{COMPILER}: {0}")]
    NoCompiler(io::Error),
    /// The compiler refused a file.
    #[error("{file}:\n{said}")]
    Refused {
        /// The file.
        file: String,
        /// The compiler's messages.
        said: String,
    },
    /// An edit does not fit the sources.
    #[error("{file} does not contain {text:?}")]
    NothingToEdit {
        /// The file.
        file: String,
        /// The text to replace.
        text: String,
    },
    /// The library could not be opened.
    #[error("{0}")]
    Load(#[from] libloading::Error),
}

/// A change of a kernel's source, to see that the software GPU finds faults.
#[derive(Clone, Debug, Hash)]
pub struct Edit {
    /// The file's name.
    pub file: &'static str,
    /// Text that occurs in it.
    pub from: &'static str,
    /// What stands there instead, at its first occurrence.
    pub to: &'static str,
}

/// Built libraries: `libcuda.so` with the kernels, `libcublasLt.so` and `libnccl.so`.
#[derive(Clone, Debug)]
pub struct SoftwareGpu {
    folder: PathBuf,
}

impl SoftwareGpu {
    /// Builds the libraries, or finds what was built from the same sources. `address_sanitizer`: finds accesses outside
    /// of buffers; the process needs [`address_sanitizer`].
    ///
    /// # Errors
    /// The compiler is missing or refuses a file, or an edit does not fit.
    pub fn build(address_sanitizer: bool, edits: &[Edit]) -> Result<Self, Error> {
        let mut sources = Vec::new();
        for folder in [KERNELS, DOUBLES] {
            for entry in fs::read_dir(folder).map_err(|e| io_error(Path::new(folder), e))? {
                let file = entry.map_err(|e| io_error(Path::new(folder), e))?.path();
                let text = fs::read_to_string(&file).map_err(|e| io_error(&file, e))?;
                sources.push((file.file_name().unwrap_or_default().to_string_lossy().into_owned(), text));
            }
        }
        sources.sort();
        for Edit { file, from, to } in edits {
            let nothing = || Error::NothingToEdit { file: (*file).into(), text: (*from).into() };
            let (_, text) = sources.iter_mut().find(|(name, _)| name == file).ok_or_else(nothing)?;
            let at = text.find(from).ok_or_else(nothing)?;
            text.replace_range(at..at + from.len(), to);
        }
        let mut flags: Vec<&str> = FLAGS.to_vec();
        // With AddressSanitizer, optimising takes longer than the tests. Besides, it makes one call of sinf and cosf, in which
        // the sanitizer sees a fault that is not there.
        flags.extend(if address_sanitizer { ["-O0", "-fsanitize=address"].as_slice() } else { &["-O1"] });
        let folder = Path::new(BUILDS).join(hash(&(&sources, &flags, LIBRARIES)));
        if !folder.exists() {
            // Several processes may build at once; each has its own folder until it is complete.
            let own = folder.with_extension(std::process::id().to_string());
            compile(&own, &sources, &flags)?;
            if fs::rename(&own, &folder).is_err() {
                fs::remove_dir_all(&own).map_err(|e| io_error(&own, e))?;
            }
        }
        Ok(Self { folder })
    }

    /// Opens the libraries in this process. The dynamic linker then gives these to everything that opens them by name.
    ///
    /// # Errors
    /// The dynamic linker refuses them.
    #[allow(unsafe_code)]
    pub fn load(&self) -> Result<(), Error> {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        for (name, _) in LIBRARIES {
            // SAFETY: the libraries' initialisers only register kernels. They are never closed.
            std::mem::forget(unsafe { Library::open(Some(self.folder.join(name)), RTLD_NOW | RTLD_GLOBAL)? });
        }
        Ok(())
    }

    /// Environment variable with which a process finds the libraries.
    pub fn environment(&self) -> (&'static str, String) {
        ("LD_LIBRARY_PATH", self.folder.display().to_string())
    }
}

/// Environment variables for a process that uses libraries built with AddressSanitizer.
///
/// # Errors
/// The compiler, which knows where its sanitizer is, can't be started.
pub fn address_sanitizer() -> Result<[(&'static str, String); 2], Error> {
    let asked = Command::new(COMPILER).arg("-print-file-name=libasan.so").output().map_err(Error::NoCompiler)?;
    let library = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    // The process leaks the libraries on purpose.
    Ok([("LD_PRELOAD", library), ("ASAN_OPTIONS", "detect_leaks=0".to_owned())])
}

fn io_error(file: &Path, source: io::Error) -> Error {
    Error::Io { file: file.into(), source }
}

fn hash(value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Compiles the sources that no earlier build has compiled, all at once, and links the libraries.
fn compile(folder: &Path, sources: &[(String, String)], flags: &[&str]) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(|e| io_error(folder, e))?;
    for (name, text) in sources {
        let file = folder.join(name);
        fs::write(&file, text).map_err(|e| io_error(&file, e))?;
    }
    let (units, headers): (Vec<_>, Vec<_>) =
        sources.iter().partition(|(name, _)| name.ends_with(".cu") || name.ends_with(".cc"));
    let (mut running, mut objects) = (Vec::new(), Vec::new());
    for (name, text) in units {
        let object = Path::new(BUILDS).join(hash(&(text, &headers, flags))).with_extension("o");
        if !object.exists() {
            let made = folder.join(name).with_extension("o");
            let mut command = Command::new(COMPILER);
            command.args(flags).args(["-x", "c++", "-c", name, "-o"]).arg(&made).current_dir(folder);
            running.push((name.clone(), start(&mut command)?, made, object.clone()));
        }
        objects.push((name, object));
    }
    for (name, child, made, object) in running {
        finish(name, child)?;
        fs::rename(&made, &object).map_err(|e| io_error(&object, e))?;
    }
    let other = |name: &str| LIBRARIES.iter().any(|(_, source)| *source == Some(name));
    for (library, source) in LIBRARIES {
        let is_own = |name: &str| source.map_or(!other(name), |source| source == name);
        let own = objects.iter().filter(|(name, _)| is_own(name)).map(|(_, object)| object);
        let mut command = Command::new(COMPILER);
        command.args(flags).args(["-shared", "-o", library]).arg(format!("-Wl,-soname,{library}")).args(own);
        if source.is_some() {
            command.args(["-L.", "-lcuda", "-Wl,-rpath,$ORIGIN"]);
        }
        finish(library.into(), start(command.current_dir(folder))?)?;
    }
    Ok(())
}

fn start(command: &mut Command) -> Result<Child, Error> {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(Error::NoCompiler)
}

fn finish(file: String, child: Child) -> Result<(), Error> {
    let done = child.wait_with_output().map_err(Error::NoCompiler)?;
    match done.status.success() {
        true => Ok(()),
        false => Err(Error::Refused { file, said: String::from_utf8_lossy(&done.stderr).into_owned() }),
    }
}
