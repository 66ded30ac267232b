#!/bin/busybox sh
# First process of the virtual machine: makes an RDMA device of a network interface, and runs the tests.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/tmp RUST_BACKTRACE=1 OVERFILL_RDMA_REQUIRED=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
now() { cut -d' ' -f1 /proc/uptime; }
for module in crc32_generic rdma_rxe ib_uverbs veth; do modprobe $module || echo "RDMA-VM: no module $module"; done
/tools/ip link set lo up
# In /tools, because the shell prefers its own commands of the same name. Soft-RoCE needs an interface with an address. Packets between two queue pairs of one device stay in the machine.
/tools/ip link add veth0 mtu 4200 type veth peer name veth1 mtu 4200
/tools/ip addr add 10.0.0.1/24 dev veth0
/tools/ip link set veth0 up
/tools/ip link set veth1 up
/tools/rdma link add rxe0 type rxe netdev veth0
/tools/rdma link
ulimit -l unlimited
echo "RDMA-VM: device after $(now) s"
failed=0
for test in /t/debug/deps/*; do
    echo "RDMA-VM: $test"
    timeout -s KILL 240 "$test" --nocapture --test-threads=1
    code=$?
    echo "RDMA-VM: $test ended with $code after $(now) s"
    [ $code = 0 ] || failed=1
done
[ $failed = 0 ] && echo "RDMA-VM: PASSED"
poweroff -f
