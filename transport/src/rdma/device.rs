//! The device, and the memory of a store that it may access.

use std::sync::Arc;

use overfill_kv::{KvStore, Ticket, store::KvRegion};
use sideway::ibverbs::address::{Gid, GidType};
use sideway::ibverbs::device::{DeviceInfo, DeviceList};
use sideway::ibverbs::device_context::{DeviceContext, LinkLayer, PortState};
use sideway::ibverbs::protection_domain::ProtectionDomain;

use super::verbs::{Registered, Staging};
use super::{DeviceChoice, Queue, RdmaError};

/// An open device and one of its ports.
pub(super) struct Device {
    pub name: String,
    pub context: Arc<DeviceContext>,
    pub domain: Arc<ProtectionDomain>,
    pub port: u8,
    pub gid_index: u8,
    pub gid: [u8; 16],
    pub lid: u16,
    /// Code of the maximum packet size.
    pub mtu: u8,
    pub ethernet: bool,
}

/// A device and the memory of a store. Cheap to share; one per node.
pub struct Pool {
    // Declared first: the device forgets the memory before the store frees it.
    regions: Option<Vec<Registered>>,
    device: Arc<Device>,
    store: Arc<dyn KvStore>,
}

fn call(call: &'static str) -> impl Fn(&dyn std::error::Error) -> RdmaError {
    move |error| {
        let source = error.source().map_or_else(String::new, |source| format!(": {source}"));
        RdmaError::Call { call, error: format!("{error}{source}") }
    }
}

impl Device {
    fn open(choice: Option<&DeviceChoice>) -> Result<Self, RdmaError> {
        let none = |e: &dyn std::error::Error| RdmaError::NoDevice(e.source().map_or(e.to_string(), |s| s.to_string()));
        let list = DeviceList::new().map_err(|e| none(&e))?;
        let mut names = Vec::new();
        let mut problem = None;
        for device in list.iter() {
            let name = device.name();
            if choice.is_none_or(|choice| choice.name == name) {
                match Self::use_port(&name, device.open().map_err(|e| call("ibv_open_device")(&e))?, choice) {
                    Ok(device) => return Ok(device),
                    Err(error) => problem = problem.or(Some(error)),
                }
            }
            names.push(name);
        }
        Err(problem.unwrap_or_else(|| match choice {
            Some(choice) => RdmaError::Device {
                device: choice.name.clone(),
                problem: format!("not found; this system has: {}", names.join(", ")),
            },
            None => RdmaError::NoDevice("this system has none".into()),
        }))
    }

    fn use_port(name: &str, context: Arc<DeviceContext>, choice: Option<&DeviceChoice>) -> Result<Self, RdmaError> {
        let failed = |problem: String| RdmaError::Device { device: name.to_owned(), problem };
        let count = context.query_device().map_err(|e| call("ibv_query_device")(&e))?.phys_port_cnt();
        let ports = match choice.and_then(|choice| choice.port) {
            Some(port) => port..=port,
            None => 1..=count,
        };
        let active = ports.clone().find_map(|port| {
            let attributes = context.query_port(port).ok()?;
            (attributes.port_state() == PortState::Active).then_some((port, attributes))
        });
        let (port, attributes) =
            active.ok_or_else(|| failed(format!("no active port among {} to {}", ports.start(), ports.end())))?;
        let wanted = choice.and_then(|choice| choice.gid_index);
        let (gid_index, gid) = Self::best_gid(&context, port, attributes.gid_tbl_len(), wanted)
            .ok_or_else(|| failed(format!("port {port} has no address that can be used")))?;
        let domain = context.alloc_pd().map_err(|e| call("ibv_alloc_pd")(&e))?;
        Ok(Self {
            name: name.to_owned(),
            domain,
            port,
            gid_index,
            gid: gid.raw,
            lid: attributes.lid(),
            mtu: attributes.active_mtu() as u8,
            ethernet: attributes.link_layer() == LinkLayer::Ethernet,
            context,
        })
    }

    /// The address `wanted`, or the best one: RoCE v2 with an IPv4 address, RoCE v2 with a routable one, any other.
    fn best_gid(context: &DeviceContext, port: u8, count: i32, wanted: Option<u8>) -> Option<(u8, Gid)> {
        let candidates = match wanted {
            Some(index) => index..=index,
            // The device takes an index of 8 bits; tables may be longer.
            None => 0..=(count - 1).clamp(0, i32::from(u8::MAX)) as u8,
        };
        let rank = |gid: &Gid, kind: GidType| match (kind, gid.raw[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff])
        {
            (GidType::RoceV2, true) => 3,
            (GidType::RoceV2, false) if !gid.is_unicast_link_local() => 2,
            (GidType::RoceV1, _) => 0,
            _ => 1,
        };
        candidates
            .filter_map(|index| {
                // An empty entry is an error or zero.
                let entry = context.query_gid_ex(port, u32::from(index)).ok()?;
                (!entry.gid().is_zero()).then(|| (rank(&entry.gid(), entry.gid_type()), index, entry.gid()))
            })
            // Of equal ones the first.
            .max_by_key(|(rank, index, _)| (*rank, u8::MAX - index))
            .map(|(_, index, gid)| (index, gid))
    }
}

impl Pool {
    /// Opens a device and registers the memory of `store`, if it has any that the device can access. This can take
    /// seconds, because the memory is locked.
    ///
    /// # Errors
    /// There is no such device, or the system does not let this process lock the memory.
    pub fn open(choice: Option<&DeviceChoice>, store: Arc<dyn KvStore>) -> Result<Self, RdmaError> {
        let device = Arc::new(Device::open(choice)?);
        let regions = store.regions().unwrap_or_default();
        let register = || regions.iter().map(|region| Registered::store(&device.domain, region)).collect();
        let regions = match (regions.first(), register()) {
            (None, _) => None,
            (Some(_), Ok(registered)) => Some(registered),
            (Some(KvRegion::Host(_)), Err(error)) => return Err(error),
            // The RDMA device, its driver or the driver of the other device can't do it.
            (Some(KvRegion::DmaBuf(_)), Err(error)) => {
                tracing::warn!(%error, "device memory can't be shared with the RDMA device; kv goes through a staging area");
                None
            }
        };
        Ok(Self { regions, device, store })
    }

    /// Device, port and address, and whether the device accesses the KV where it lies.
    pub fn describe(&self) -> String {
        let Device { name, port, gid_index, .. } = &*self.device;
        let how = if self.is_direct() { "directly" } else { "through a staging area" };
        format!("{name}:{port}:{gid_index}, {how}")
    }

    /// Whether the device accesses the KV where it lies.
    pub(crate) fn is_direct(&self) -> bool {
        self.regions.is_some()
    }

    /// Creates a queue pair for one handoff. Takes a few system calls.
    pub(crate) async fn queue(self: &Arc<Self>, ticket: &Ticket) -> Result<Queue, RdmaError> {
        Queue::new(self.clone(), ticket)
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn store(&self) -> &Arc<dyn KvStore> {
        &self.store
    }

    /// The registered memory of each layer of the store.
    pub(super) fn regions(&self) -> Option<&[Registered]> {
        self.regions.as_deref()
    }

    pub(super) fn staging(&self, bytes: usize) -> Result<Staging, RdmaError> {
        Staging::new(&self.device.domain, bytes)
    }
}
