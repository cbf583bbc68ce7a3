output "addresses" {
  description = "Public addresses."
  value       = { for name, ip in openstack_networking_floatingip_v2.public : name => ip.address }
}

output "inventory" {
  description = "Private address and role of each machine: what deploy/ansible/inventory.example.yml asks for."
  value       = { for name, role in module.plan.nodes : name => { role = role, address = openstack_compute_instance_v2.node[name].access_ip_v4 } }
}

# Blazar's leases have no resource in the provider: these commands make them
output "lease_commands" {
  description = "One command a lease, for the OpenStack client with the Blazar plugin."
  value = [
    for block in module.plan.blocks :
    "openstack reservation lease create ${block.name} --start-date '${formatdate("YYYY-MM-DD hh:mm", block.start)}' --end-date '${formatdate("YYYY-MM-DD hh:mm", block.end)}' --reservation 'resource_type=physical:host,min=1,max=${block.gpus},resource_properties=[\"=\",\"$node_type\",\"gpu_a100_pcie\"]'"
  ]
}
