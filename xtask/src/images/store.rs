//! Where buildah and podman keep images, containers and networks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::succeeds;

/// A place for images, containers and networks, as environment variables of buildah and podman.
pub struct Store {
    state: PathBuf,
    variables: Vec<(&'static str, PathBuf)>,
}

impl Store {
    /// The user's own.
    pub fn own() -> Self {
        Self { state: PathBuf::new(), variables: Vec::new() }
    }

    /// A place in a folder. Tests use it, so that they neither see nor change what the user has.
    pub fn apart(folder: &Path) -> Result<Self> {
        let place = |name: &str| folder.join("store").join(name);
        let driver = if overlays(folder)? { "overlay" } else { "vfs" };
        let storage = format!(
            "[storage]\ndriver = {driver:?}\ngraphroot = {:?}\nrunroot = {:?}\n",
            place("images"),
            place("state/running"),
        );
        // The limits are low because podman's own may be higher than what this machine allows: then no container starts.
        // crun is podman's default, and refuses machines that have both versions of cgroups.
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]\n\n\
             [engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\ntmp_dir = {:?}\n\n\
             [network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = {:?}\n",
            place("state/tmp"),
            place("networks"),
        );
        let mut variables = Vec::new();
        for (variable, file, text) in
            [("CONTAINERS_STORAGE_CONF", "storage.conf", storage), ("CONTAINERS_CONF", "containers.conf", containers)]
        {
            let path = folder.join(file);
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            variables.push((variable, path));
        }
        let state = place("state");
        std::fs::create_dir_all(&state).with_context(|| format!("creating {}", state.display()))?;
        Ok(Self { state, variables })
    }

    /// Returns whether it is the user's own.
    pub fn is_own(&self) -> bool {
        self.variables.is_empty()
    }

    /// Returns a command that uses this place.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.envs(self.variables());
        command
    }

    /// Returns the folder of what is only true until the machine restarts.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns environment variables that make buildah and podman use this place.
    pub fn variables(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        self.variables.iter().map(|(name, path)| (*name, path.as_path()))
    }
}

/// Returns whether a folder's file system can be the upper layer of an overlay. An overlay can't.
fn overlays(folder: &Path) -> Result<bool> {
    let trial = folder.join("overlay-trial");
    for name in ["lower", "upper", "work", "merged"] {
        let path = trial.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    }
    // The mount ends with its namespace.
    let mount = "mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged";
    let mounted = succeeds(Command::new("unshare").args(["--mount", "sh", "-c", mount]).current_dir(&trial));
    std::fs::remove_dir_all(&trial).with_context(|| format!("removing {}", trial.display()))?;
    Ok(mounted)
}
