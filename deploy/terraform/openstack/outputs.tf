output "addresses" {
  description = "Public addresses."
  value       = { for name, ip in openstack_networking_floatingip_v2.public : name => ip.address }
}

output "inventory" {
  description = "Private address and role of each machine: what deploy/ansible/inventory.example.yml asks for."
  value = merge(
    { for name, role in module.plan.nodes : name => { role = role, address = openstack_compute_instance_v2.node[name].access_ip_v4 } },
    { for name, machine in openstack_compute_instance_v2.serving : name => { role = "gpu", address = machine.access_ip_v4 } },
  )
}

output "data_device" {
  description = "The disk for films on the machine with the role data: share_device of deploy/ansible."
  value       = openstack_compute_volume_attach_v2.data.device
}

output "capacity" {
  description = "What the environment asks for, and what the machines offer it."
  value       = module.plan.capacity
}

# Blazar's leases have no resource in the provider: these commands make them
output "lease_commands" {
  description = "One command a lease, for the OpenStack client with the Blazar plugin. A lease is for whole machines: min and max count those."
  value = [
    for block in module.plan.blocks :
    "openstack reservation lease create ${block.name} --start-date '${formatdate("YYYY-MM-DD hh:mm", block.start)}' --end-date '${formatdate("YYYY-MM-DD hh:mm", block.end)}' --reservation 'resource_type=physical:host,min=${block.hosts},max=${block.hosts},resource_properties=[\"=\",\"$node_type\",\"${var.gpu_node_type}\"]'"
  ]
}
