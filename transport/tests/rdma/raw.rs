//! A sender that does not follow the protocol: it writes what and when a test wants.
#![allow(unsafe_code, reason = "the verbs library's calls")]

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use overfill_kv::handoff::{Commit, Piece, RefuseReason};
use overfill_kv::{BlockId, KvTransport, TransportSet};
use overfill_transport::rdma::{Grant, RdmaAddress};
use overfill_transport::tcp::format::{Format, Sums};
use overfill_transport::tcp::frame::{self, ANSWER_BYTES, Answer, Header};
use overfill_transport::tcp::hello::{self, Offer, Way};
use sideway::ibverbs::AccessFlags;
use sideway::ibverbs::address::{AddressHandleAttribute, Gid};
use sideway::ibverbs::completion::{BasicCompletionQueue, GenericCompletionQueue, WorkCompletionStatus};
use sideway::ibverbs::device::DeviceList;
use sideway::ibverbs::device_context::Mtu;
use sideway::ibverbs::memory_region::MemoryRegion;
use sideway::ibverbs::queue_pair::{
    BasicQueuePair, PostSendGuard, QueuePair, QueuePairAttribute, QueuePairState, SetScatterGatherEntry,
    WorkRequestFlags,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::rig::Rig;

/// Every byte that the sender writes.
pub const WRITTEN: u8 = 0xa7;
const LIMIT: Duration = Duration::from_secs(20);

pub struct Raw {
    pair: BasicQueuePair,
    completions: Arc<BasicCompletionQueue>,
    memory: Arc<MemoryRegion>,
    bytes: Vec<u8>,
    grant: Grant,
    stream: TcpStream,
    block_bytes: usize,
    format: Format,
    number: u32,
}

impl Raw {
    /// A sender whose ticket the receiver has accepted, with RDMA.
    pub async fn accepted(rig: &Rig, ticket: [u8; 16]) -> Self {
        let list = DeviceList::new().unwrap();
        let context = list.get(0).unwrap().open().unwrap();
        let domain = context.alloc_pd().unwrap();
        let completions = context.create_cq_builder().setup_cqe(256).build().unwrap();
        let both = GenericCompletionQueue::from(completions.clone());
        let mut builder = domain.create_qp_builder();
        let mut pair = builder.setup_send_cq(both.clone()).setup_recv_cq(both).setup_max_send_wr(64).build().unwrap();
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::Init).setup_pkey_index(0).setup_port(1);
        pair.modify(attributes.setup_access_flags(AccessFlags::LocalWrite)).unwrap();
        let block_bytes = rig.schema.block_bytes();
        let bytes = vec![WRITTEN; block_bytes];
        // SAFETY: the memory lives as long as `Raw`.
        let memory =
            unsafe { domain.reg_mr(bytes.as_ptr().expose_provenance(), bytes.len(), AccessFlags::LocalWrite) }.unwrap();
        // The first address that is not link-local, as the transport chooses.
        let gids = (0..8).filter_map(|i| Some((i, context.query_gid(1, u32::from(i)).ok()?)));
        let (gid_index, gid) = gids.clone().find(|(_, gid)| gid.raw[10..12] == [0xff; 2]).unwrap();

        let mut stream = TcpStream::connect(&rig.endpoint).await.unwrap();
        let address = RdmaAddress { qp: pair.qp_number(), psn: 5, gid: gid.raw, lid: 0, mtu: 3 };
        let offer = Offer::new(rig.hello(ticket), TransportSet::of(&[KvTransport::Rdma]), Some(address), None);
        stream.write_all(&hello::encode(&offer)).await.unwrap();
        assert_eq!(answer(&mut stream).await, Answer::Accepted);
        let length = stream.read_u32_le().await.unwrap() as usize;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        let Way::Rdma(grant) = hello::decode_grant(&body).unwrap().way else { panic!("no grant of RDMA") };

        let peer = grant.address;
        let mut to = AddressHandleAttribute::new();
        to.setup_port(1)
            .setup_grh_src_gid_index(gid_index)
            .setup_grh_dest_gid(&Gid { raw: peer.gid })
            .setup_grh_hop_limit(1);
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::ReadyToReceive).setup_path_mtu(Mtu::Mtu1024).setup_address_vector(&to);
        attributes
            .setup_dest_qp_num(peer.qp)
            .setup_rq_psn(peer.psn)
            .setup_max_dest_read_atomic(0)
            .setup_min_rnr_timer(12);
        pair.modify(&attributes).unwrap();
        let mut attributes = QueuePairAttribute::new();
        attributes.setup_state(QueuePairState::ReadyToSend).setup_sq_psn(5).setup_max_read_atomic(0);
        pair.modify(attributes.setup_timeout(12).setup_retry_cnt(3).setup_rnr_retry(3)).unwrap();
        let format = Format::new(2, rig.schema.kv_heads);
        Self { pair, completions, memory, bytes, grant, stream, block_bytes, format, number: 0 }
    }

    /// Writes one block, and waits until the device says that it is done, or why not.
    fn write_block(&mut self, layer: usize, block: usize, number: Option<u32>) -> Result<(), String> {
        let place = self.grant.places.layers[layer];
        let to = place.address + (self.grant.places.blocks[block] as usize * self.block_bytes) as u64;
        let mut guard = self.pair.start_post_send();
        let request = guard.construct_wr(0, WorkRequestFlags::Signaled);
        let request = match number {
            Some(number) => request.setup_write_imm(place.key, to, number.to_be()),
            None => request.setup_write(place.key, to),
        };
        // SAFETY: the memory lives as long as `Raw`, and the write has ended when this returns.
        unsafe { request.setup_sge(self.memory.lkey(), self.memory.get_ptr() as u64, self.bytes.len() as u32) };
        guard.post().map_err(|error| error.to_string())?;
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if let Ok(mut poller) = self.completions.start_poll()
                && let Some(completion) = poller.next()
            {
                return match WorkCompletionStatus::from(completion.status()) {
                    WorkCompletionStatus::Success => Ok(()),
                    status => Err(format!("{status:?}")),
                };
            }
        }
        panic!("the device says nothing");
    }

    /// Writes into all blocks, again and again, until the device reports an error. Returns what it said.
    pub fn write_until_it_fails(mut self) -> JoinHandle<String> {
        std::thread::spawn(move || {
            let (layers, blocks) = (self.grant.places.layers.len(), self.grant.places.blocks.len());
            let begin = Instant::now();
            for i in 0.. {
                assert!(begin.elapsed() < LIMIT, "the sender was never stopped");
                if let Err(error) = self.write_block(i / blocks % layers, i % blocks, None) {
                    return format!("{i} writes done, the next one failed: {error}");
                }
            }
            unreachable!()
        })
    }

    /// Writes a piece, the last block with its number.
    pub async fn write_piece(&mut self, layer: usize, first: usize, blocks: usize) {
        for block in first..first + blocks {
            let last = block + 1 == first + blocks;
            self.write_block(layer, block, last.then_some(self.number)).unwrap();
        }
    }

    /// Uses a number that is not the next one.
    pub fn skip_number(&mut self) {
        self.number += 1;
    }

    /// Sends the header of a piece, and its checksum or a wrong one.
    pub async fn announce(&mut self, layer: u32, first_block: u32, blocks: u32, right: bool) {
        let mut bytes = self.format.encode(&Header::Written(Piece { layer, first_block, blocks }, self.number));
        let start = frame::next_sum(0, &bytes);
        let sum = (0..blocks).fold(start, |sum, _| Sums::PerBlock.next(sum, &self.bytes));
        bytes.extend((sum ^ u64::from(!right)).to_le_bytes());
        self.stream.write_all(&bytes).await.unwrap();
        self.number += 1;
    }

    pub async fn commit(&mut self) {
        let commit = Commit { first_token: 1, frames: 1, bytes: self.block_bytes as u64 };
        self.stream.write_all(&self.format.commit(&commit, 0)).await.unwrap();
    }

    /// Why the receiver has ended the attempt.
    pub async fn refusal(&mut self) -> RefuseReason {
        match answer(&mut self.stream).await {
            Answer::Refuse(reason) => reason,
            other => panic!("{other:?}"),
        }
    }
}

async fn answer(stream: &mut TcpStream) -> Answer {
    let mut bytes = [0; ANSWER_BYTES];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut bytes)).await.unwrap().unwrap();
    frame::decode_answer(&bytes).unwrap()
}

impl Rig {
    pub fn first_byte(&self, layer: usize, block: BlockId) -> u8 {
        let mut first = 0;
        self.target.read(layer, &[block], &mut |_, bytes| first = bytes[0]).unwrap();
        first
    }

    /// What another request writes into the blocks of all layers.
    pub fn fill_target(&self, blocks: &[BlockId], value: u8) {
        for layer in 0..self.target.num_layers() {
            self.target.write(layer, blocks, &mut |_, bytes| bytes.fill(value)).unwrap();
        }
    }

    pub fn check_filled(&self, blocks: &[BlockId], value: u8) {
        for layer in 0..self.target.num_layers() {
            let check = &mut |i: usize, bytes: &[u8]| {
                let late = bytes.iter().filter(|byte| **byte != value).count();
                assert_eq!(late, 0, "KV-1: late bytes in layer {layer}, block {i}");
            };
            self.target.read(layer, blocks, check).unwrap();
        }
    }
}
